"""The fall-back of the example: a model for the same pictures that fits into a device (2,710 parameters)."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from edgefl import Task

HELD_OUT = 360  # a fifth of 1,797
CUT_SEED = 20


def _pictures() -> tuple[np.ndarray, np.ndarray]:
    """Return pictures (1797, 1, 32, 32) in 0..1 and labels, in a fixed random order."""
    digits = load_digits()
    order = np.random.default_rng(CUT_SEED).permutation(len(digits.target))
    wide = np.kron(digits.images[order] / 16, np.ones((4, 4)))
    return wide[:, None].astype(np.float32), digits.target[order].astype(np.int64)


def load_part(part: str = "0", parts: str = "1") -> tuple[np.ndarray, np.ndarray]:
    """Return a device's own pictures and labels."""
    pictures, labels = _pictures()
    return pictures[HELD_OUT + int(part) :: int(parts)], labels[HELD_OUT + int(part) :: int(parts)]


def load_held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return the held-out fifth, on which no device trains."""
    pictures, labels = _pictures()
    return pictures[:HELD_OUT], labels[:HELD_OUT]


def make_model() -> nn.Module:
    """One pixel of each square of four by four, and one hidden layer."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 36), nn.ReLU(), nn.Linear(36, 10))


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the fraction of samples whose largest output is the right one."""
    return (outputs.argmax(1) == targets).float().mean().item()


task = Task(
    name="digits-small",
    model=make_model,
    loss=nn.functional.cross_entropy,
    train_data=load_part,
    test_data=load_held_out,
    metrics={"accuracy": accuracy},
)
