"""A recorded step gives what autograd gives, or is not used."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgefl import Task
from edgefl.config import TrainConfig
from edgefl.simulation.engines.fleets import TrainingMethod
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.stacked_fleet import StackedFleet
from edgefl.simulation.steps import recording
from edgefl.simulation.steps.batch import Batch
from edgefl.simulation.steps.recording import RecordedDescent, RecordedFunction, RecordedGradient, has_compiler
from edgefl.training.local import train_locally
from edgefl.training.steps.descent import Autograd, Descent


class Counting(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs) / self.calls


class Branching(nn.Linear):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if float(outputs.detach().sum()) > 0 else -outputs


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.used(inputs)


def deep():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))


def gradients(make, *, compiled=False, rows=6):
    torch.manual_seed(1)
    model = make()
    task = Task(name="t", model=make, loss=nn.functional.cross_entropy, train_data=lambda: None)
    inputs, targets = torch.randn(rows, 4), torch.randint(0, 2, (rows,))
    return model, RecordedGradient(task, model, compiled=compiled), task, inputs, targets


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own use of it
@pytest.mark.parametrize("compiled", [False, True])
def test_random_layers_and_buffers_move_as_they_do_by_autograd(compiled):
    if compiled and not has_compiler():
        pytest.skip("there is no C++ compiler")
    model, gradient, task, inputs, targets = gradients(deep, compiled=compiled)
    gradient(inputs, targets)  # records
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    seen, loss = gradient(inputs, targets)
    moved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    torch.manual_seed(7)
    wanted, wanted_loss = Autograd(task, model)(inputs, targets)
    assert gradient.why_not == ""
    torch.testing.assert_close(loss, wanted_loss)
    for one, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(one, other)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(moved[name], tensor)
    assert moved["1.num_batches_tracked"] == state["1.num_batches_tracked"] + 1


def test_recording_leaves_the_model_and_the_random_state_as_they_were():
    model, gradient, _, inputs, targets = gradients(deep)
    before, random = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    gradient._record(Batch.of(inputs, targets))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_parameter_without_a_part_in_the_loss_has_no_gradient():
    _, gradient, _, inputs, targets = gradients(Unused)
    seen, _ = gradient(inputs, targets)
    assert gradient.why_not == ""
    assert [one is None for one in seen] == [False, False, True, True]


@pytest.mark.parametrize("make", [deep, Unused, lambda: Branching(4, 2)])
def test_a_plain_step_is_that_of_the_gradients(make):
    model, gradient, task, inputs, targets = gradients(make)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = []
    for descent in (RecordedDescent(task, gradient), Descent(task, Autograd(task, model))):
        model.load_state_dict(state)
        torch.manual_seed(7)
        descent.begin(TrainConfig(lr=0.5))
        losses = [descent.take(inputs, targets) for _ in range(3)]
        moved.append({**{name: tensor.clone() for name, tensor in model.state_dict().items()}, "losses": losses})
    torch.testing.assert_close(*moved)
    assert not torch.equal(moved[0]["losses"][0], moved[0]["losses"][2])


@pytest.mark.parametrize(
    ("make", "why"), [(Counting, "keeps state of its own"), (lambda: Branching(4, 2), "recording a step raised")]
)
def test_what_cannot_be_recorded_is_left_to_autograd(make, why):
    model, gradient, task, inputs, targets = gradients(make)
    seen, _ = gradient(inputs, targets)
    assert why in gradient.why_not
    if make is not Counting:
        wanted, _ = Autograd(task, model)(inputs, targets)
        torch.testing.assert_close(list(seen), list(wanted))


def test_every_shape_is_a_recording_of_its_own():
    model, gradient, _, inputs, targets = gradients(deep)
    model[2].p = 0.0
    for rows in (6, 3, 6):
        seen, loss = gradient(inputs[:rows], targets[:rows])
        assert (len(seen), loss.shape) == (6, ())
    assert len(gradient._recordings) == 2


def test_a_function_is_recorded_when_its_shapes_have_come_often():
    calls = []

    def double(tensor):
        calls.append(len(tensor))
        return (tensor * 2, tensor.sum())

    recorded = RecordedFunction("t", double, 1)
    for k in range(6):
        result = recorded(torch.full((2,), float(k)))
        assert [one.tolist() for one in result.materialized()] == [[2.0 * k] * 2]
        assert float(result.loss) == 2 * k
    assert calls == [2, 2, 2, 2]  # three times by itself, once to record


def test_a_model_of_very_many_parameters_is_left_to_autograd(monkeypatch):
    monkeypatch.setattr("edgefl.simulation.steps.recording.MAX_PARAMETERS", 3)
    _, gradient, _, inputs, targets = gradients(Unused)  # it has 4
    gradient(inputs, targets)
    assert "4 parameters, too many to record" in gradient.why_not
    calls = []
    recorded = RecordedFunction("t", lambda *tensors: (calls.append(1), *tensors, tensors[0].sum())[1:], 4)
    for _ in range(5):
        recorded(*torch.ones(4, 2).unbind())
    assert len(calls) == 5  # never from a recording


@pytest.mark.parametrize("engine", [LoopFleet, StackedFleet])
def test_nothing_is_recorded_where_that_is_switched_off(set_up, plan_of, monkeypatch, engine):
    recordings = []
    whole = recording.record

    def noting(*arguments):
        recordings.append(arguments)
        return whole(*arguments)

    monkeypatch.setattr(recording, "record", noting)
    monkeypatch.setattr(recording, "RECORD_AT", 1)
    setup = set_up()
    plan = plan_of(setup)
    off = dataclasses.replace(setup, method=TrainingMethod(recorded=False))
    answers = list(engine(off).collect(plan))
    assert not recordings
    if engine is LoopFleet:  # and each client is trained as on a device, bit for bit
        for answer in answers:
            options = setup.population.options(answer.device)
            own = train_locally(setup.task, plan.parameters, plan.train, options=options, round=1, client=answer.device)
            for name, array in own.tree.items():
                np.testing.assert_array_equal(answer.tree[name], array)
    list(engine(setup).collect(plan))
    assert recordings
