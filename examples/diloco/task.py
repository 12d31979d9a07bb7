"""A small GPT that reads and writes Python, one character at a time, on text that is on every machine.

The text is the source of Python's standard library. A sample is LENGTH characters; the model says at each what comes
next. A module's name decides where it belongs: a tenth of the modules is held out, the others are dealt to the sites,
so that parts never overlap, also if the sites have other versions of Python:

    edgefl agent start --data part=0 --data parts=4
"""

import math
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from edgefl import Task

CHARACTERS, OTHER = 128, 127  # ASCII; anything else is one character
LENGTH, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
MAX_FILES, MAX_FILE_BYTES, HELD_OUT_OF = 160, 40_000, 10


class Block(nn.Module):
    """Attention to what came before, then a small network, each beside the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_hidden = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:  # (B, T, WIDTH)
        batch, length, _ = stream.shape
        parts = self.attention(self.before_attention(stream)).view(batch, length, 3, HEADS, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B, HEADS, T, WIDTH / HEADS) each
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.joined(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        return stream + self.hidden(self.before_hidden(stream))


class Gpt(nn.Module):
    """A decoder: characters (B, T) to logits of the next ones (B, T, CHARACTERS)."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.last = nn.LayerNorm(WIDTH)
        self.next = nn.Linear(WIDTH, CHARACTERS, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02 if module is not self.next else 0.02 / math.sqrt(LAYERS))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        stream = self.characters(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        return self.next(self.last(stream))


def next_character(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy over all characters of a batch, in nats."""
    return cross_entropy(logits.flatten(0, 1), wanted.flatten())


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


@cache
def _modules() -> dict[str, np.ndarray]:
    """Return the text of modules, by name: (N,) characters each."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(folder.glob("*.py")) if file.stat().st_size > LENGTH][:MAX_FILES]
    texts = {file.stem: np.frombuffer(file.read_bytes()[:MAX_FILE_BYTES], np.uint8) for file in files}
    return {name: np.minimum(text, OTHER).astype(np.int64) for name, text in texts.items()}


def _samples(of: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray]:
    """Return windows of the modules that `of` accepts, and the same one character further: (N, LENGTH) each."""
    pairs = []
    for name, text in _modules().items():
        if of(zlib.crc32(name.encode())):
            windows = np.lib.stride_tricks.sliding_window_view(text, LENGTH + 1)[:: LENGTH // 2]
            pairs.append(windows)
    windows = np.concatenate(pairs)
    return windows[:, :-1].copy(), windows[:, 1:].copy()


def load_part(part: str = "0", parts: str = "1") -> tuple[np.ndarray, np.ndarray]:
    return _samples(lambda key: key % HELD_OUT_OF and key // HELD_OUT_OF % int(parts) == int(part))


def load_test() -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = _samples(lambda key: key % HELD_OUT_OF == 0)
    return inputs[::4], targets[::4]


task = Task(
    name="diloco", model=Gpt, loss=next_character, optimizer=adamw, train_data=load_part, test_data=load_test,
)  # fmt: skip
