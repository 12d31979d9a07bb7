"""An optimizer that is made anew goes on as if it had not been: bit for bit, in memory and through a file."""

import dataclasses

import numpy as np
import pytest
import torch

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, TaskError
from edgefl.task import FitResult, Task
from edgefl.training.local import initial_parameters, train_locally
from edgefl.training.steps.optimizer_state import optimizer_state, refuse_no_optimizer, restore_optimizer
from edgefl.trees import SpooledTree, apply, write_tree

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.1),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
    "two groups, in another order": lambda parameters: torch.optim.AdamW(
        [{"params": [parameters[1]], "lr": 0.3}, {"params": [parameters[0]]}], lr=0.1
    ),
    "not all": lambda parameters: torch.optim.AdamW([parameters[1]], lr=0.1),
}


class Counting(torch.optim.Optimizer):
    """Counts steps in a Python number, and steps less far in each."""

    def __init__(self, parameters, **kept):
        super().__init__(parameters, {})
        self._kept = kept

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.update(self._kept)
            state["steps"] = state.get("steps", 0) + 1
            parameter.data -= parameter.grad / state["steps"]


def parameters_of(dtype=torch.float32):
    return [torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).to(dtype)), torch.nn.Parameter(torch.ones(2).to(dtype))]


def steps(optimizer, parameters, numbers):
    for number in numbers:
        for parameter in parameters:
            parameter.grad = torch.sin(parameter.detach() + number)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_steps_as_the_first_one_would_have(tmp_path, name, dtype):
    wanted, parameters = parameters_of(dtype), parameters_of(dtype)
    steps(OPTIMIZERS[name](wanted), wanted, range(5))
    first = OPTIMIZERS[name](parameters)
    steps(first, parameters, range(3))
    with (tmp_path / "state").open("wb") as file:
        write_tree(optimizer_state(first, parameters), file)
    second = OPTIMIZERS[name](parameters)
    restore_optimizer(second, parameters, SpooledTree(tmp_path / "state"))
    steps(second, parameters, range(3, 5))
    for one, other in zip(parameters, wanted, strict=True):
        assert torch.equal(one, other)


def test_momentum_by_hand():
    parameters = [torch.nn.Parameter(torch.tensor([1.0]))]
    first = torch.optim.SGD(parameters, lr=1.0, momentum=0.5)
    parameters[0].grad = torch.tensor([2.0])
    first.step()
    kept = optimizer_state(first, parameters)
    assert {name: one.tolist() for name, one in kept.items()} == {"optimizer/0/momentum_buffer": [2.0]}
    second = torch.optim.SGD(parameters, lr=0.1, momentum=0.5)  # the round's own rate holds
    restore_optimizer(second, parameters, kept)
    parameters[0].grad = torch.tensor([3.0])
    second.step()
    assert parameters[0].item() == pytest.approx(1.0 - 2.0 - 0.1 * (0.5 * 2.0 + 3.0))
    assert kept["optimizer/0/momentum_buffer"].tolist() == [2.0]  # a copy


def test_a_number_stays_a_number():
    parameters = parameters_of()
    first = Counting(parameters)
    steps(first, parameters, range(2))
    kept = optimizer_state(first, parameters)
    assert kept["optimizer/1/steps:number"].shape == ()
    second = Counting(parameters)
    restore_optimizer(second, parameters, kept)
    assert second.state[parameters[0]] == {"steps": 2}
    assert isinstance(second.state[parameters[0]]["steps"], int)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"history": [1]}, "the optimizer Counting keeps a list as 'history'; expected tensors and numbers"),
        ({"mean": torch.tensor([1.0, float("nan")])}, "the state 'mean' of the optimizer Counting is not finite"),
        ({"mean": torch.ones(2, dtype=torch.complex64)}, "keeps 'mean', which cannot be stored"),
    ],
)
def test_what_cannot_be_kept_is_refused(kept, said):
    parameters = parameters_of()
    optimizer = Counting(parameters, **kept)
    steps(optimizer, parameters, range(1))
    with pytest.raises(TaskError, match=said):
        optimizer_state(optimizer, parameters)


def test_the_state_of_another_model_is_refused():
    parameters = parameters_of()
    with pytest.raises(TaskError, match=r"has 'optimizer/2/a'; it now has 2 parameters"):
        restore_optimizer(Counting(parameters), parameters, {"optimizer/2/a": np.zeros(1), "other/0/b": np.zeros(1)})


X = np.array([[1.0], [2.0]], np.float32)


def line(optimizer=None):
    return Task(
        name="line", model=lambda: torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss,
        train_data=lambda: (X, 2 * X), optimizer=optimizer,
    )  # fmt: skip


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr)


def test_two_rounds_are_one_of_twice_the_steps():
    config, task = TrainConfig(steps=3, batch_size=2, keep_optimizer_state=True), line(adamw)
    start = initial_parameters(task)
    result = train_locally(task, start, config, options={}, round=1, client="a")
    middle = {name: apply(one, result.tree[name]) for name, one in start.items()}
    again = train_locally(task, middle, config, options={}, round=2, client="a", state=result.state)
    longer = dataclasses.replace(config, steps=6)
    once = train_locally(task, start, longer, options={}, round=1, client="a")
    anew = train_locally(task, middle, config, options={}, round=2, client="a")
    assert once.state["optimizer/0/step"] == again.state["optimizer/0/step"] == 6
    for name, one in start.items():
        np.testing.assert_allclose(result.tree[name] + again.tree[name], once.tree[name], rtol=1e-6)
        assert np.abs(again.tree[name] - anew.tree[name]).max() > 1e-4, one
    assert not train_locally(task, start, TrainConfig(steps=3), options={}, round=1, client="a").state


def test_a_task_without_an_optimizer_is_refused_by_name():
    keeps = TrainConfig(keep_optimizer_state=True)
    refuse_no_optimizer(line(adamw), keeps)
    refuse_no_optimizer(line(), TrainConfig())
    with pytest.raises(ConfigError, match=r"task 'line' has no optimizer of its own, and plain SGD has no state"):
        refuse_no_optimizer(line(), keeps)
    own = Task(name="own", initial=dict, fit=lambda *_: FitResult(tree={}, weight=1))
    with pytest.raises(ConfigError, match=r"task 'own' has its own fit"):
        refuse_no_optimizer(own, keeps)
    with pytest.raises(ConfigError, match=r"keep_optimizer_state=true: fedsgd takes no local steps"):
        TrainConfig(keep_optimizer_state=True, algorithm="fedsgd")
