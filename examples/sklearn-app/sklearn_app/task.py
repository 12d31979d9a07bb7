"""Multinomial logistic regression by scikit-learn on its own digits: nothing is downloaded.

Deterministic: `lbfgs` from a given start has no randomness, and parts depend on their number alone.
"""

import warnings
from functools import cache

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

HELD_OUT = 360  # a fifth of 1,797 pictures: the server's
NUM_CLASSES, NUM_PIXELS = 10, 64


@cache
def load_all() -> tuple[np.ndarray, np.ndarray]:
    """Return all pictures, flat, and labels, shuffled once and for all."""
    pictures, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(20).permutation(len(labels))
    return pictures[order] / 16, labels[order]


def load_part(part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every `parts`-th of the pictures that are not held out."""
    pictures, labels = load_all()
    return pictures[HELD_OUT + part :: parts], labels[HELD_OUT + part :: parts]


def load_held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures that no client trains on."""
    pictures, labels = load_all()
    return pictures[:HELD_OUT], labels[:HELD_OUT]


def make_model(
    weights: list[np.ndarray] | None = None, *, epochs: int = 1, penalty: float = 1e-4
) -> LogisticRegression:
    """Make a classifier that goes on from these weights (zeros where none are given)."""
    model = LogisticRegression(C=1 / penalty, max_iter=epochs, warm_start=True)
    model.classes_ = np.arange(NUM_CLASSES)
    model.coef_, model.intercept_ = weights or [np.zeros((NUM_CLASSES, NUM_PIXELS)), np.zeros(NUM_CLASSES)]
    return model


def train(model: LogisticRegression, data: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Train for the model's few iterations and return the weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a round is meant to stop early
        model.fit(*data)
    return [model.coef_, model.intercept_]
