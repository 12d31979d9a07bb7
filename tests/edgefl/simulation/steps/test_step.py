"""One door to steps, with a switch: recorded or not, it is the same step."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import edgefl.simulation.steps
from edgefl import Task
from edgefl.config import TrainConfig
from edgefl.simulation.steps import make_stacked_step, make_step
from edgefl.simulation.steps.recording import RecordedDescent, RecordedFunction

FOLDER = Path(edgefl.simulation.steps.__file__).parent
TASK = Task(name="t", model=lambda: nn.Linear(4, 2), loss=nn.functional.cross_entropy, train_data=lambda: None)


@pytest.mark.parametrize("lr", [0.1, 1.0])
def test_a_recorded_step_is_the_one_that_is_not(lr):
    torch.manual_seed(3)
    inputs, targets, moved = torch.randn(6, 4), torch.randint(0, 2, (6,)), []
    for recorded in (True, False):
        torch.manual_seed(1)
        model = TASK.model()
        step = make_step(TASK, model, recorded=recorded)
        assert isinstance(step, RecordedDescent) == recorded
        step.begin(TrainConfig(lr=lr))
        losses = [step.take(inputs, targets) for _ in range(4)]
        moved.append([*losses, model.weight, model.bias])
    assert not torch.equal(moved[0][0], moved[0][3])
    torch.testing.assert_close(*moved)


def test_a_stacked_step_gives_each_clients_gradient_recorded_or_not():
    def halves(weights, inputs):  # the loss of client k is sum(w_k * x_k) / 2
        return inputs / 2, (weights * inputs).sum(1) / 2

    weights, inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 6.0]])
    for recorded in (True, False):
        step = make_stacked_step(TASK, halves, 1, recorded=recorded)
        assert isinstance(step, RecordedFunction) == recorded
        for _ in range(5):
            seen = step(weights, inputs)
        assert [one.tolist() for one in seen.materialized()] == [[[1.0, 0.0], [0.0, 3.0]]]
        assert seen.loss.tolist() == [1.0, 12.0]


def test_nobody_reaches_around_the_door():
    inside = {f"edgefl.simulation.steps.{path.stem}" for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    others = [path for path in FOLDER.parents[1].rglob("*.py") if path.parent != FOLDER]
    assert len(others) > 100
    for path in others:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} & inside, path
