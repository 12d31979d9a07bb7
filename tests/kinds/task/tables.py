"""Models of tables: one row of numbers a sample."""

from __future__ import annotations

import numpy as np
from common import normal, torch_task
from torch import nn

NUM_FEATURES, HIDDEN = 8, 96


def dense(outputs, inputs=NUM_FEATURES):
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
    )


def classes(rng, count):
    table = normal(rng, count, NUM_FEATURES)
    return table, table[:, :3].argmax(1)


def labels(rng, count):
    table = normal(rng, count, NUM_FEATURES)
    return table, (table[:, :3] + table[:, 3:6] > 0).astype(np.float32)


def numbers(rng, count):
    table = normal(rng, count, NUM_FEATURES)
    return table, np.sin(table[:, :1]) + 0.5 * table[:, 1:2] - table[:, 2:3]


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


classification = torch_task(
    "classification", lambda: dense(3), nn.functional.cross_entropy, classes, metrics={"accuracy": accuracy}
)
multi_label = torch_task("multi_label", lambda: dense(3), nn.functional.binary_cross_entropy_with_logits, labels)
regression = torch_task("regression", lambda: dense(1), nn.functional.mse_loss, numbers)
