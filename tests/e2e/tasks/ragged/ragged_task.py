"""A small network in float64, on parts of unequal size: what every engine can run."""

import numpy as np
import torch
from torch import nn

from edgefl import Task


def load_part(part, parts):
    rng = np.random.default_rng([int(part), int(parts)])
    inputs = torch.from_numpy(rng.normal(size=(7 + 10 * int(part), 6)))  # a tensor keeps its float64
    return inputs, (inputs.sum(1) > 0).long()


def make_model():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).double()


task = Task(
    name="ragged", model=make_model, loss=nn.functional.cross_entropy, train_data=load_part,
    test_data=lambda: load_part("9", "10"),
)  # fmt: skip
