"""A local step by hand: plain, with the proximal term, with the task's optimizer."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training.steps.descent import Autograd, Descent, loss_of

X, Y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])


class Line(torch.nn.Module):
    """y = w * x, from w = 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.0))
        self.unused = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.w * x


TASK = Task(name="line", model=Line, loss=torch.nn.functional.mse_loss, train_data=tuple)


def test_a_plain_step_by_hand():
    model = Line()
    descent = Descent(TASK, Autograd(TASK, model))
    descent.begin(TrainConfig(lr=0.1))
    assert descent.take(X, Y).item() == 2.5  # mean((w x - y)^2)
    assert model.w.item() == pytest.approx(1.0 + 0.1 * 5.0)  # its gradient is -5
    assert model.unused.item() == 3.0
    assert descent.kept() == {}


def test_the_proximal_term_pulls_back_by_hand():
    model = Line()
    descent = Descent(TASK, Autograd(TASK, model))
    descent.begin(TrainConfig(lr=0.1, proximal_mu=2.0))
    descent.take(X, Y)
    assert model.w.item() == pytest.approx(1.5)  # at the start it pulls nowhere
    descent.take(X, Y)
    assert model.w.item() == pytest.approx(1.5 - 0.1 * (2.5 * (2 * 1.5 - 4) + 2.0 * 0.5))


def test_the_tasks_optimizer_steps_and_goes_on_from_its_state():
    momentum = dataclasses.replace(TASK, optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.5))
    model = Line()
    descent = Descent(momentum, Autograd(momentum, model))
    descent.begin(TrainConfig(lr=0.1))
    descent.take(X, Y)
    kept = descent.kept()
    assert {name: one.item() for name, one in kept.items()} == {"optimizer/0/momentum_buffer": -5.0}
    descent.before = kept
    descent.begin(TrainConfig(lr=0.2))
    descent.take(X, Y)
    assert model.w.item() == pytest.approx(1.5 + 0.2 * (0.5 * 5.0 + 2.5))


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(TaskError, match=r"loss returned shape \[2, 1\]"):
        loss_of(dataclasses.replace(TASK, loss=lambda o, t: (o - t) ** 2), X, Y)
