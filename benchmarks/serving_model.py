"""The model for the benchmark of predictions: a CNN with 692k parameters for 28x28 images, exported to int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgefl import Task
from edgefl.operator.publish import export
from edgefl.training.local import initial_parameters
from edgefl.trees import write_tree

SHAPE = (1, 1, 28, 28)
_SAMPLES = 256


class Net(nn.Module):
    """Two convolutions and two dense layers: 691,675 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 7 * 7, 435), nn.ReLU(), nn.Linear(435, 10))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixels))


def build(folder: Path) -> Path:
    """Write the int8 model to a folder and return its path."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(_SAMPLES, *SHAPE[1:])).astype(np.float32)
    targets = generator.integers(0, 10, _SAMPLES)
    task = Task(
        name="cnn", model=Net, loss=nn.functional.cross_entropy,
        train_data=lambda: (inputs, targets), test_data=lambda: (inputs, targets),
    )  # fmt: skip
    parameters = folder / "parameters.safetensors"
    with parameters.open("wb") as file:
        write_tree(initial_parameters(task), file)
    return export(task, parameters, folder, compression="int8", max_drop=0.5).path
