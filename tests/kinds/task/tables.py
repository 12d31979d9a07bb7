"""Models of tables: one row of numbers a sample."""

from __future__ import annotations

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


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


classification = torch_task(
    "classification", lambda: dense(3), nn.functional.cross_entropy, classes, metrics={"accuracy": accuracy}
)
