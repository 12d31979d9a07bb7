"""Structures are trained and evaluated as single tensors are: the same numbers."""

import dataclasses

import numpy as np
import pytest
import torch

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training import evaluate, initial_parameters, train_locally
from edgefl.training.broadcast import refuse_broadcast
from edgefl.training.metrics import WholeSet
from tests.edgefl import structured_tasks as made

mse = torch.nn.functional.mse_loss
CONFIG = TrainConfig(batch_size=4, epochs=2, lr=0.1)


def trained(task, config=CONFIG, **options):
    return train_locally(task, initial_parameters(made.plain), config, options=options, round=1, client="c")


def same(one, other):
    assert one.weight == other.weight
    assert list(one.tree) == list(other.tree)
    assert all(np.array_equal(array, other.tree[name]) for name, array in one.tree.items())


@pytest.mark.parametrize("task", [made.tuples, made.dicts])
@pytest.mark.parametrize("settings", [{}, {"algorithm": "fedsgd"}, {"proximal_mu": 0.5}])
def test_inputs_in_parts_train_as_one_tensor_bit_for_bit(task, settings):
    config = dataclasses.replace(CONFIG, **settings)
    one, other = trained(made.plain, config), trained(task, config)
    same(other, one)
    assert other.metrics == one.metrics


def test_several_outputs_train_up_to_rounding():
    one, other = trained(made.plain), trained(made.deep)
    for name, array in one.tree.items():
        np.testing.assert_allclose(other.tree[name], array, atol=1e-6)


def test_structures_are_evaluated_as_single_tensors():
    parameters = initial_parameters(made.plain)
    wanted = evaluate(made.plain, parameters)["loss"]
    assert evaluate(made.tuples, parameters)["loss"] == evaluate(made.dicts, parameters)["loss"] == wanted
    found = evaluate(made.deep, parameters)
    inputs, targets = made.numbers("0")
    model = made.Plain()
    model.load_state_dict({name: torch.from_numpy(np.array(one)) for name, one in parameters.items()})
    assert found["loss"] == pytest.approx(wanted, rel=1e-6)
    assert found["first_error"] == pytest.approx((model(inputs)[:, 0] - targets[:, 0]).abs().mean().item(), rel=1e-6)


def test_a_function_of_structures_that_is_no_mean_is_refused():
    task = dataclasses.replace(made.deep, metrics={"worst": lambda outputs, targets: outputs["first"].abs().max()})
    with pytest.raises(TaskError, match="metric 'worst' is not a mean over samples"):
        evaluate(task, initial_parameters(made.plain))


def test_whole_set_joins_the_leaves_of_all_batches():
    seen = []
    metric = WholeSet(lambda outputs, targets: seen.append((outputs, targets)) or 0.0)
    for n in (2, 3):
        metric.update({"a": torch.full((n, 1), float(n))}, (torch.zeros(n), torch.ones(n, 2)))
    metric.compute()
    ((outputs, targets),) = seen
    assert outputs["a"].flatten().tolist() == [2, 2, 3, 3, 3]
    assert [one.shape for one in targets] == [(5,), (5, 2)]


def test_whole_set_says_which_batches_do_not_fit_together():
    metric = WholeSet(lambda outputs, targets: 0.0)
    metric.update({"words": torch.zeros(2, 7)}, torch.zeros(2))
    metric.update({"words": torch.zeros(2, 5)}, torch.zeros(2))
    with pytest.raises(TaskError, match=r"words float32 \(2, 7\); words float32 \(2, 5\)\. Give an object with update"):
        metric.compute()


def of_dicts(outputs, targets):
    return mse(outputs["a"], targets["a"])


def test_a_loss_that_broadcasts_one_of_several_outputs_is_refused():
    outputs = {"a": torch.arange(4.0)[:, None], "b": torch.zeros(4)}
    with (
        pytest.warns(UserWarning, match="target size"),
        pytest.raises(TaskError, match=r"broadcasts outputs \(N, 1\) against targets \(N,\)"),
    ):
        refuse_broadcast("t", of_dicts, outputs, {"a": torch.arange(4.0), "b": torch.zeros(4)})


@pytest.mark.parametrize(
    "targets",
    [
        {"a": torch.arange(4.0)[:, None], "b": torch.zeros(4)},  # as it should be
        {"a": torch.arange(4.0)[:, None], "c": torch.zeros(4)},  # other names: nothing is known
        (torch.arange(4.0)[:, None], torch.zeros(4)),
        {"a": torch.arange(4.0)[:, None], "b": torch.zeros(3)},
        {"a": torch.arange(4.0)[:, None], "b": None},
    ],
)
def test_structures_of_which_nothing_is_known_are_left_alone(targets):
    refuse_broadcast("t", lambda *_: torch.tensor(0.0), {"a": torch.arange(4.0)[:, None], "b": torch.zeros(4)}, targets)


class Images(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Conv2d(3, 2, 3), torch.nn.Linear(4, 1)

    def forward(self, picture, table):
        return self.head(torch.cat([self.layer(picture).mean((2, 3)), table], 1))


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_pictures_beside_a_table_train_with_channels_last(algorithm):
    task = Task(
        name="both", model=Images, loss=mse,
        train_data=lambda: ({"picture": torch.randn(6, 3, 5, 5), "table": torch.randn(6, 2)}, torch.randn(6, 1)),
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, algorithm=algorithm)
    result = train_locally(task, initial_parameters(task), config, options={}, round=1, client="c")
    assert all(np.isfinite(array).all() for array in result.tree.values())
    assert np.abs(result.tree["layer.weight"]).max() > 0


class Lengths(torch.nn.Module):
    """Outputs as long as the longest sequence of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, steps):
        return self.layer(steps[:, : int(steps.sum(1).max()), None] * 0 + 1.0)


def test_outputs_of_different_lengths_are_evaluated():
    def load():
        steps = torch.zeros(200, 6)
        steps[:128, :3] = 1  # the first batch of an evaluation
        steps[128:] = 1
        return steps, torch.ones(200, 1, 1)

    task = Task(
        name="l", model=Lengths, loss=lambda outputs, targets: mse(outputs, targets.expand_as(outputs)),
        train_data=load, test_data=load, metrics={"error": lambda outputs, targets: (outputs - targets).abs().mean()},
    )  # fmt: skip
    parameters = {"layer.weight": np.zeros((1, 1), np.float32), "layer.bias": np.full(1, 3, np.float32)}
    assert evaluate(task, parameters) == {"loss": 4.0, "error": 2.0}
