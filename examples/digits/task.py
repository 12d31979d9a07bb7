"""Handwritten digits of 8x8 pixels, from scikit-learn's own wheel: nothing is downloaded.

1,797 pictures. A fifth is held out, the same fifth everywhere, and no device ever trains on it. The
rest is cut into `parts`; each device takes its own by data options:

    edgefl agent start --data part=0 --data parts=3 --data skew=0.8

`skew` is the share of a part that comes sorted by label, so that devices see different digits: 0 deals
all samples at random, 1 gives each device its own few labels. Parts never overlap, whatever the order
in which devices ask: everything here depends on the options alone.
"""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from edgefl import Task

HELD_OUT = 360  # a fifth of 1,797
CUT_SEED = 20


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pictures (1797, 1, 8, 8) in 0..1 and labels, in a fixed random order."""
    digits = load_digits()
    order = np.random.default_rng(CUT_SEED).permutation(len(digits.target))
    pictures = (digits.images[order, None] / 16).astype(np.float32)
    return pictures, digits.target[order].astype(np.int64)


def split_by_label(labels: np.ndarray, parts: int, skew: float) -> list[np.ndarray]:
    """Split the indices of `labels` into parts: a fraction `skew` sorted by label, the rest at random."""
    order = np.random.default_rng(CUT_SEED).permutation(len(labels))
    sorted_share, mixed = np.split(order, [round(skew * len(order))])
    sorted_share = sorted_share[np.argsort(labels[sorted_share], kind="stable")]
    pairs = zip(np.array_split(sorted_share, parts), np.array_split(mixed, parts), strict=True)
    return [np.concatenate(pair) for pair in pairs]


@cache
def _cut(parts: int, skew: float) -> list[np.ndarray]:
    """Split once for all parts: a simulation may load a thousand of them."""
    return split_by_label(_digits()[1][HELD_OUT:], parts, skew)


def load_part(part: str = "0", parts: str = "1", skew: str = "0.8") -> tuple[np.ndarray, np.ndarray]:
    """Return this device's own pictures and labels."""
    if not 0 <= int(part) < int(parts) or not 0 <= float(skew) <= 1:
        message = f"part={part} must be in 0..{int(parts) - 1} (parts={parts}), and skew={skew} in 0..1"
        raise ValueError(message)
    pictures, labels = (array[HELD_OUT:] for array in _digits())
    chosen = _cut(int(parts), float(skew))[int(part)]
    return pictures[chosen], labels[chosen]


def load_held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return the held-out fifth, on which no device trains."""
    pictures, labels = _digits()
    return pictures[:HELD_OUT], labels[:HELD_OUT]


def make_model() -> nn.Module:
    """A small CNN: 21,546 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the fraction of samples whose largest output is the right one."""
    return (outputs.argmax(1) == targets).float().mean().item()


task = Task(
    name="digits",
    model=make_model,
    loss=nn.functional.cross_entropy,
    train_data=load_part,
    test_data=load_held_out,
    metrics={"accuracy": accuracy},
)
