"""Which tasks can be stacked, and the reason of each that cannot."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch

from edgefl.config import JobConfig, load_config
from edgefl.errors import TaskError
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.engines.stackable import why_not_chosen, why_not_stacked
from edgefl.simulation.world.task_population import TaskPopulation
from edgefl.task import load_task

DIGITS = Path(__file__).parents[4] / "examples" / "digits"


@pytest.mark.parametrize("name", ["task", "half"])
def test_what_can(set_up, name):
    assert why_not_stacked(set_up(name)) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dropout", "is dropout"),
        ("norm", "is batch norm"),
        ("adam", "its own optimizer"),
        ("own_fit", "its own fit"),
        ("summed", "expected a mean"),
    ],
)
def test_what_cannot_and_why(set_up, name, reason):
    assert reason in (why_not_stacked(set_up(name)) or "")


def test_one_gradient_a_client_is_not_stacked(set_up):
    assert "fedsgd" in (why_not_stacked(set_up(train={"algorithm": "fedsgd"})) or "")


class Odd(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = torch.nn.Linear(4, 2).double(), kind
        if kind == "buffer":
            self.register_buffer("steps", torch.zeros(1))

    def forward(self, inputs):
        if self.kind == "branch" and inputs.abs().sum() >= 0:
            return self.layer(inputs) * 2
        if self.kind == "random" and self.training:
            return self.layer(inputs) + 1e-9 * torch.rand(len(inputs), 1)
        if self.kind == "scaled":  # what it computes depends on whether it is mapped
            return self.layer(inputs) * (2 if torch._C._functorch.peek_interpreter_stack() else 1)
        return self.layer(inputs)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("buffer", "'steps' is a buffer"),
        ("branch", "torch.func cannot map it"),
        ("random", "torch.func cannot map it"),
        ("scaled", "differs by"),
    ],
)
def test_what_only_a_look_inside_or_a_trial_shows(set_up, kind, reason):
    setup = set_up()
    odd = dataclasses.replace(setup, task=dataclasses.replace(setup.task, model=lambda: Odd(kind)))
    assert reason in (why_not_stacked(odd) or "")


def test_nobody_to_try_it_with(set_up):
    setup = set_up(clients=1, data={"empty": "0"})
    with pytest.raises(TaskError, match="the device has no data"):
        why_not_stacked(setup)
    assert why_not_chosen(setup) == "in a trial, a client fails in the loop, too"


def test_an_error_of_the_task_is_told_as_in_the_loop_and_not_as_one_of_stacks(set_up):
    def loss(outputs, targets):
        return outputs + "a"

    setup = set_up()
    broken = dataclasses.replace(setup, task=dataclasses.replace(setup.task, loss=loss))
    line = loss.__code__.co_firstlineno + 1
    with pytest.raises(TaskError, match=rf"local training raised TypeError: .* \({__file__}:{line}\)$"):
        why_not_stacked(broken)
    assert why_not_chosen(broken) == "in a trial, a client fails in the loop, too"


def test_rounding_that_many_steps_make_larger_is_no_reason():
    task = load_task(str(DIGITS))
    config = load_config(JobConfig, DIGITS / "config.toml", ["train.epochs=30", "train.lr=1.0", "rounds.count=1"])
    maker = partial(TaskPopulation, num_clients=5, options={})
    setup = SimulationSetup(task=task, reference=None, make_population=maker, population=maker(task), config=config)
    assert why_not_stacked(setup) is None
