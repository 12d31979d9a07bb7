"""What of a task's tensors moves in its rounds, and what stays."""

import numpy as np
import pytest
import torch
from torch import nn

from edgefl import FitResult, Task
from edgefl.errors import ConfigError, TaskError
from edgefl.training.parts import parts_of


class Tied(nn.Module):
    """A frozen body with batch norm, a counter, and a head under two names."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.again = self.head
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.step = nn.Parameter(torch.tensor(3), requires_grad=False)
        self.body.requires_grad_(False)

    def forward(self, inputs):
        return self.again(self.norm(self.body(inputs))) * self.scale


def task(model=Tied, **more):
    return Task(name="t", model=model, loss=nn.functional.cross_entropy, train_data=lambda: None, **more)


def own(**more):
    return Task(
        name="own", initial=lambda: {"a": np.zeros(2), "b": np.zeros(3)},
        fit=lambda tree, *_: FitResult(tree=tree, weight=1.0), **more,
    )  # fmt: skip


def test_frozen_parameters_stay_and_all_else_moves_under_each_of_its_names():
    parts = parts_of(task())
    assert parts.frozen.keys() == {"body.weight", "body.bias", "step"}
    assert set(parts.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    trained = {"scale", "norm.weight", "norm.bias", "head.weight", "head.bias", "again.weight", "again.bias"}
    assert parts.moving.keys() == trained | set(parts.buffers)


def test_other_values_are_split_alike():
    parts = parts_of(own(trained=["b"])).split({"a": np.ones(2), "b": np.full(3, 2.0)})
    assert (parts.moving["b"].tolist(), parts.frozen["a"].tolist()) == ([2, 2, 2], [1, 1])


def test_a_fit_trains_everything_or_what_the_task_names():
    assert (parts_of(own()).moving.keys(), parts_of(own()).frozen) == ({"a", "b"}, {})
    assert parts_of(own(trained=("b",))).moving.keys() == {"b"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task(lambda: nn.Linear(2, 2).requires_grad_(False)), "trains nothing"),
        (lambda: own(trained=["c"]), "trained names c, which `initial` does not return"),
        (lambda: own(trained=[]), "trains nothing"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, message):
    with pytest.raises(TaskError, match=message):
        parts_of(make())


@pytest.mark.parametrize("make", [lambda: task(trained=["head.weight"]), lambda: own(trained="a")])
def test_trained_names_tensors_of_a_task_with_fit(make):
    with pytest.raises(ConfigError, match="belongs to a task with fit, and lists names of tensors"):
        make()
