"""How far will diabetes have progressed in a year? A small network on the table that comes with scikit-learn.

442 patients with ten measurements each. A quarter is held out, and no device ever trains on it; the others are dealt
to the devices:

    edgefl agent start --data part=0 --data parts=3

The metric is R2, which is no mean over samples: torchmetrics' `R2Score` would do, or a function over the whole set as
here. `examples/tabular/trees` learns the same table with XGBoost.
"""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from edgefl import Task, WholeSet

HELD_OUT, CUT_SEED, NUM_COLUMNS = 110, 0, 10
MEAN, SPREAD = 150.0, 77.0  # of the targets, about: the network's own output is near 0


@cache  # a simulation calls the loaders once per client
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Return inputs (442, 10), with a spread of 1, and targets (442, 1), in a fixed random order."""
    inputs, targets = load_diabetes(return_X_y=True)
    order = np.random.default_rng(CUT_SEED).permutation(len(targets))
    scaled = inputs[order] * np.sqrt(len(targets))  # scikit-learn's columns have a length of 1
    return scaled.astype(np.float32), targets[order, None].astype(np.float32)


def load_part(part: str = "0", parts: str = "1") -> tuple[np.ndarray, np.ndarray]:
    """Return this device's own rows."""
    if not 0 <= int(part) < int(parts):
        message = f"part={part} must be in 0..{int(parts) - 1} (parts={parts})"
        raise ValueError(message)
    inputs, targets = _table()
    own = np.array_split(np.arange(HELD_OUT, len(targets)), int(parts))[int(part)]
    return inputs[own], targets[own]


def load_held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return the quarter on which no device trains."""
    inputs, targets = _table()
    return inputs[:HELD_OUT], targets[:HELD_OUT]


class Net(nn.Module):
    """Two dense layers; what they answer is in units of the targets' spread."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(NUM_COLUMNS, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        """(N, 10) to (N, 1)."""
        return MEAN + SPREAD * self.layers(table)


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error, in units of the targets' spread."""
    return nn.functional.mse_loss(outputs / SPREAD, targets / SPREAD)


def r2(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the share of the targets' variance that the model explains: 1 is perfect, 0 is guessing the mean."""
    return 1 - ((targets - outputs) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()


task = Task(
    name="diabetes",
    model=Net,
    loss=loss,
    train_data=load_part,
    test_data=load_held_out,
    metrics={"r2": WholeSet(r2)},
    higher_is_better={"r2": True},
)
