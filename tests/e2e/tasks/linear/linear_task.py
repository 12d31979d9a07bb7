"""Linear regression on made-up numbers: small enough to compute by hand in one process."""

import numpy as np
import torch

from edgefl import Task

SIZES = (5, 11, 17)  # unequal on purpose


def everything():
    rng = np.random.default_rng(7)
    inputs = rng.normal(size=(sum(SIZES), 4)).astype(np.float32)
    targets = (inputs @ rng.normal(size=(4, 2)) + 0.1).astype(np.float32)
    return inputs, targets


def load_part(part):
    start = sum(SIZES[: int(part)])
    return tuple(array[start : start + SIZES[int(part)]] for array in everything())


def make_model():
    model = torch.nn.Linear(4, 2)
    torch.nn.init.constant_(model.weight, 0.25)
    torch.nn.init.constant_(model.bias, -0.5)
    return model


task = Task(
    name="linear", model=make_model, loss=torch.nn.functional.mse_loss, train_data=load_part, test_data=everything
)
