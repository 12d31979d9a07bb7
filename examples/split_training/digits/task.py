"""Handwritten digits, trained in parts: the device has the first layers, the cloud the rest.

The data are scikit-learn's own 1,797 pictures: nothing is downloaded. A fifth is held out, the rest is dealt to
`parts`; each device takes its own by data options: `--data part=0 --data parts=2`.
"""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from edgefl import Task

HELD_OUT = 360  # a fifth of 1,797


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pictures (1797, 1, 8, 8) in 0..1 and labels, in a fixed random order."""
    digits = load_digits()
    order = np.random.default_rng(20).permutation(len(digits.target))
    return (digits.images[order, None] / 16).astype(np.float32), digits.target[order].astype(np.int64)


def load_part(part: str = "0", parts: str = "1") -> tuple[np.ndarray, np.ndarray]:
    """Return this device's own pictures and labels."""
    pictures, labels = _digits()
    chosen = slice(HELD_OUT + int(part), None, int(parts))
    return pictures[chosen], labels[chosen]


def load_held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return the held-out fifth, on which no device trains."""
    pictures, labels = _digits()
    return pictures[:HELD_OUT], labels[:HELD_OUT]


class Net(nn.Module):
    """A small CNN. The device's part ends with `eyes`, the cloud's with `body`."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, 10)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return a score for each digit (N, 10)."""
        scores: torch.Tensor = self.head(self.body(self.eyes(pictures)))
        return scores


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the fraction of samples whose largest output is the right one."""
    return (outputs.argmax(1) == targets).float().mean().item()


task = Task(
    name="split-digits",
    model=Net,
    loss=nn.functional.cross_entropy,
    train_data=load_part,
    test_data=load_held_out,
    metrics={"accuracy": accuracy},
)
