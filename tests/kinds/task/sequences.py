"""Models of sequences: padded, with lengths or masks, and of plain signals."""

from __future__ import annotations

import numpy as np
import torch
from common import PART_SIZES, normal, torch_task
from torch import nn

LENGTH, NUM_WORDS, WIDTH = 10, 16, 32
SHORT = 6  # the length in the second part of the task with sequences of two lengths
mse = nn.functional.mse_loss


def padded(rng, count, length=LENGTH):
    """Return words 1..15, padded with 0 to one length; their lengths; and the share of even words."""
    lengths = rng.integers(2, length + 1, size=count)
    words = rng.integers(1, NUM_WORDS, size=(count, length)) * (np.arange(length) < lengths[:, None])
    even = ((words > 0) & (words % 2 == 0)).sum(1, keepdims=True) / lengths[:, None]
    return words, lengths, even.astype(np.float32)


def with_lengths(rng, count):
    words, lengths, wanted = padded(rng, count)
    return {"words": words, "lengths": lengths}, wanted


def with_masks(rng, count):
    words, _, wanted = padded(rng, count, SHORT if count == PART_SIZES[1] else LENGTH)
    return {"words": words, "mask": words > 0}, wanted


def signals(rng, count):
    height, noise = rng.normal(size=(count, 1, 1)), 0.1 * normal(rng, count, 2, 32)
    waves = height * np.sin(np.arange(32) / 3) + noise
    return waves.astype(np.float32), np.abs(height[:, 0]).astype(np.float32)


class LastStep(nn.Module):
    """An LSTM over all steps; the output is of each sequence's last own step."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(NUM_WORDS, WIDTH, padding_idx=0), nn.Linear(WIDTH, 1)
        self.cells = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, words, lengths):
        steps, _ = self.cells(self.embed(words))
        last = (lengths - 1)[:, None, None].expand(-1, 1, WIDTH)
        return self.head(steps.gather(1, last)[:, 0])


class Packed(nn.Module):
    """A GRU over a packed sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(NUM_WORDS, WIDTH, padding_idx=0), nn.Linear(WIDTH, 1)
        self.cells = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, words, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(words), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, last = self.cells(packed)
        return self.head(last[-1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(NUM_WORDS, WIDTH), nn.Linear(WIDTH, 1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, words, mask):
        steps = self.layers(self.embed(words), src_key_padding_mask=~mask)
        kept = mask[:, :, None].to(steps.dtype)
        return self.head((steps * kept).sum(1) / kept.sum(1))


def convolutions():
    return nn.Sequential(
        nn.Conv1d(2, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 32, 5, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 1),
    )  # fmt: skip


lstm = torch_task("lstm", LastStep, mse, with_lengths)
packed_gru = torch_task("packed_gru", Packed, mse, with_lengths)
transformer = torch_task(
    "transformer", Transformer, mse, with_masks, dynamic={"words": {1: "length"}, "mask": {1: "length"}}
)
convolution = torch_task("convolution", convolutions, mse, signals)
# what the parts of the second kind of length are at serving
shorter = {"words": torch.ones(2, SHORT, dtype=torch.int64), "mask": torch.ones(2, SHORT, dtype=torch.bool)}
