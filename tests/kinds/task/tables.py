"""Models of tables: one row of numbers or classes a sample."""

from __future__ import annotations

import numpy as np
import torch
from common import normal, torch_task
from torch import nn

NUM_FEATURES, HIDDEN = 8, 96
cross_entropy, mse = nn.functional.cross_entropy, nn.functional.mse_loss


def dense(outputs, inputs=NUM_FEATURES):
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
    )


def curve(table):
    return np.sin(table[:, :1]) + 0.5 * table[:, 1:2] - table[:, 2:3]


def classes(rng, count):
    table = normal(rng, count, NUM_FEATURES)
    return table, table[:, :3].argmax(1)


def labels(rng, count):
    table = normal(rng, count, NUM_FEATURES)
    return table, (table[:, :3] + table[:, 3:6] > 0).astype(np.float32)


def numbers(rng, count):
    table = normal(rng, count, NUM_FEATURES)
    return table, curve(table)


def itself(rng, count):
    table = normal(rng, count, 2) @ normal(np.random.default_rng(9), 2, NUM_FEATURES)
    return table, table


def as_tuple(rng, count):
    table, wanted = numbers(rng, count)
    return (table[:, :3], table[:, 3:]), wanted


def as_dict(rng, count):
    table, wanted = numbers(rng, count)
    return {"right": table[:, 3:], "left": table[:, :3]}, wanted


def two_wanted(rng, count):
    table, wanted = numbers(rng, count)
    return table, {"value": wanted, "is_high": (wanted > 0.5).astype(np.float32)}


def words(rng, count):
    table = rng.integers(0, 20, size=(count, 4))
    return table, (table % 3 == 0).sum(1, keepdims=True).astype(np.float32)


def in_float64(rng, count):
    table, wanted = numbers(rng, count)
    return table.astype(np.float64), wanted.astype(np.float64)


def in_bfloat16(rng, count):
    return tuple(torch.from_numpy(one).bfloat16() for one in numbers(rng, count))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = dense(1)

    def forward(self, left, right):
        return self.body(torch.cat([left, right], dim=1))


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.value, self.is_high = dense(HIDDEN), nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)

    def forward(self, table):
        hidden = torch.relu(self.body(table))
        return {"value": self.value(hidden), "is_high": self.is_high(hidden)}


def both(outputs, targets):
    yes_or_no = nn.functional.binary_cross_entropy_with_logits(outputs["is_high"], targets["is_high"])
    return mse(outputs["value"], targets["value"]) + yes_or_no


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = dense(2), dense(NUM_FEATURES, inputs=2)

    def forward(self, table):
        return self.decoder(self.encoder(table))


def normed():
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(), nn.Linear(HIDDEN, 3),
    )  # fmt: skip


def embedded():
    return nn.Sequential(nn.Embedding(20, 16), nn.Flatten(), *dense(1, inputs=64))


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


classification = torch_task("classification", lambda: dense(3), cross_entropy, classes, metrics={"accuracy": accuracy})
multi_label = torch_task("multi_label", lambda: dense(3), nn.functional.binary_cross_entropy_with_logits, labels)
regression = torch_task("regression", lambda: dense(1), mse, numbers)
autoencoder = torch_task("autoencoder", Autoencoder, mse, itself)
tuple_inputs = torch_task("tuple_inputs", TwoInputs, mse, as_tuple)
dict_inputs = torch_task("dict_inputs", TwoInputs, mse, as_dict)
two_outputs = torch_task("two_outputs", TwoOutputs, both, two_wanted)
batch_norm = torch_task("batch_norm", normed, cross_entropy, classes, metrics={"accuracy": accuracy})
embeddings = torch_task("embeddings", embedded, mse, words)
float64 = torch_task("float64", lambda: dense(1).double(), mse, in_float64)
bfloat16 = torch_task("bfloat16", lambda: dense(1).bfloat16(), mse, in_bfloat16)
