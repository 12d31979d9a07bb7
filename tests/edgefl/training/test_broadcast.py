"""A loss that compares each output with every target is refused; one that removes a dimension by itself is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from edgefl import Task
from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.training.broadcast import refuse_broadcast
from edgefl.training.evaluation import evaluate
from edgefl.training.local import initial_parameters, train_locally

OUTPUTS, TARGETS = torch.arange(6.0)[:, None], torch.arange(6.0)


def squared(outputs, targets):
    return (outputs - targets).square().mean()


def test_by_hand_with_both_shapes():
    # Of 0..5 against 0..5, all 36 pairs: the variance twice, 2 * 35/12.
    with pytest.raises(
        TaskError, match=r"outputs \(N, 1\) against targets \(N,\).*: 5\.833 instead of 0 for 6 samples"
    ):
        refuse_broadcast("t", squared, OUTPUTS, TARGETS)
    with pytest.raises(TaskError, match=r"outputs \(N,\) against targets \(N, 1\)"):
        refuse_broadcast("t", squared, TARGETS, OUTPUTS)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (squared, OUTPUTS, OUTPUTS + 1),
        (lambda outputs, targets: squared(outputs.squeeze(1), targets), OUTPUTS, TARGETS + 1),
        (lambda outputs, targets: squared(outputs.squeeze(), targets), OUTPUTS, TARGETS + 1),
        (lambda outputs, targets: squared(outputs, targets[:, None]), OUTPUTS, TARGETS + 1),
        (squared, OUTPUTS[:1], TARGETS[:1]),
        (nn.functional.cross_entropy, torch.eye(3), torch.arange(3)),
        (lambda outputs, targets: squared(outputs, targets[..., None]), torch.ones(2, 3), torch.ones(2)),
        (lambda outputs, targets: (outputs.mean() - targets.mean()).square(), OUTPUTS, TARGETS * 2),
    ],
)
def test_what_does_not_broadcast_passes(loss, outputs, targets):
    refuse_broadcast("t", loss, outputs, targets)


@pytest.mark.parametrize("loss", [squared, pytest.param(mse_loss, marks=pytest.mark.filterwarnings("ignore:Using a"))])
def test_it_is_refused_on_the_device_and_in_evaluation(loss):
    def data():
        inputs = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
        return inputs, inputs.sum(1)

    task = Task(name="t", model=lambda: nn.Linear(3, 1), loss=loss, train_data=data, test_data=data)
    start = initial_parameters(task)
    with pytest.raises(TaskError, match=r"outputs \(N, 1\) against targets \(N,\)"):
        train_locally(task, start, TrainConfig(), options={}, round=1, client="a")
    with pytest.raises(TaskError, match=r"outputs \(N, 1\) against targets \(N,\)"):
        evaluate(task, start)
