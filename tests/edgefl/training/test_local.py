"""Local training: numbers worked out by hand, the laws it keeps, and tasks that misbehave."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from edgefl.aggregation import WeightedMean
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.records import Update
from edgefl.settings.server import ServerConfig
from edgefl.task import FitResult, Task
from edgefl.training.local import (
    buffer_names,
    derive_seed,
    initial_parameters,
    set_threads,
    train_locally,
)
from edgefl.trees import apply

X = np.array([[1.0], [2.0]], np.float32)
Y = np.array([[2.0], [4.0]], np.float32)


class Line(nn.Module):
    """y = w * x, with w a 0-d parameter that starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.w * x


class Net(nn.Module):
    """Batch norm, dropout, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 2)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


def line_task(x=X, y=Y, **changes):
    return replace(Task(name="line", model=Line, loss=mse_loss, train_data=lambda: (x, y)), **changes)


def net_data(n=9, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), rng.integers(0, 2, n)


def net_task(n=9, **changes):
    return replace(Task(name="net", model=Net, loss=cross_entropy, train_data=lambda: net_data(n)), **changes)


def train(task, parameters=None, *, options=None, round=1, client="a", **config):
    parameters = initial_parameters(task) if parameters is None else parameters
    return train_locally(task, parameters, TrainConfig(**config), options=options or {}, round=round, client=client)


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


# By hand.


def test_fedavg_of_one_full_batch_by_hand():
    result = train(line_task(), lr=0.1, batch_size=2)
    # loss = mean((w x - y)^2) = (1 + 4) / 2; gradient = mean(2 x (w x - y)) = (-2 - 8) / 2 = -5
    assert result.tree["w"] == pytest.approx(0.5)
    assert result.tree["w"].shape == ()
    assert (result.weight, result.metrics) == (2.0, {"train_loss": pytest.approx(2.5)})


def test_fedavg_of_two_epochs_by_hand():
    result = train(line_task(), lr=0.1, batch_size=2, epochs=2)
    # after the first step w = 1.5 and loss = (0.25 + 1) / 2, gradient = (-1 - 4) / 2 = -2.5
    assert result.tree["w"] == pytest.approx(0.75)
    assert result.metrics["train_loss"] == pytest.approx((2.5 + 0.625) / 2)


def test_fedavg_of_steps_by_hand():
    """Three samples in batches of two: the third step begins the second pass."""
    same_sample = line_task(np.ones((3, 1)), np.full((3, 1), 2.0))
    result = train(same_sample, lr=0.25, batch_size=2, steps=3)
    # losses 1, 0.25 (of one sample) and 0.0625; w = 1.5, 1.75, 1.875
    assert result.tree["w"] == pytest.approx(0.875)
    assert result.metrics["train_loss"] == pytest.approx((2 * 1 + 0.25 + 2 * 0.0625) / 5)
    assert result.weight == 3.0


def test_as_many_steps_as_two_epochs_have_are_two_epochs():
    assert same(train(net_task(10), batch_size=4, steps=6).tree, train(net_task(10), batch_size=4, epochs=2).tree)


def test_the_loss_weighs_a_short_last_batch_by_its_samples():
    same_sample = line_task(np.ones((3, 1)), np.full((3, 1), 2.0))
    result = train(same_sample, lr=0.25, batch_size=2)
    # first batch: loss 1, gradient -2, w = 1.5; last batch of one: loss 0.25, gradient -1, w = 1.75
    assert result.tree["w"] == pytest.approx(0.75)
    assert result.metrics["train_loss"] == pytest.approx((2 * 1 + 0.25) / 3)


def test_fedprox_pulls_back_by_hand():
    result = train(line_task(), lr=0.1, batch_size=2, epochs=2, proximal_mu=2.0)
    # the first step is free (w = w0): 0.5; the second has gradient -2.5 + 2 * 0.5 = -1.5
    assert result.tree["w"] == pytest.approx(0.5 + 0.15)


def test_fedsgd_sends_the_gradient_by_hand():
    result = train(line_task(), algorithm="fedsgd", batch_size=1)
    assert result.tree["w"] == pytest.approx(-5.0)
    assert (result.weight, result.metrics) == (2.0, {"train_loss": pytest.approx(2.5)})


def test_the_tasks_own_optimizer_is_used():
    result = train(
        line_task(optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=1.0)), lr=0.1, batch_size=2, epochs=2
    )
    assert result.tree["w"] == pytest.approx(0.5 + (0.5 + 0.25))


def test_our_plain_sgd_is_torchs():
    ours = train(net_task(), epochs=3, batch_size=4)
    theirs = train(net_task(optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr)), epochs=3, batch_size=4)
    assert same(ours.tree, theirs.tree)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_fedsgd_over_unequal_parts_is_one_centralised_step(optimizer):
    x, y = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32), np.arange(20) % 2

    def model():
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def part(which):
        cut = {"a": slice(0, 2), "b": slice(2, 9), "c": slice(9, 20)}[which]
        return x[cut], y[cut]

    task = Task(name="parts", model=model, loss=cross_entropy, train_data=part)
    parameters = initial_parameters(task, seed=3)
    rule = WeightedMean(parameters)
    for client in "abc":
        result = train(task, parameters, options={"which": client}, client=client, algorithm="fedsgd", batch_size=4)
        rule.add(Update(job="j", round=1, device=client, tree=result.tree, weight=result.weight))
    stepped = ServerOptimizer(ServerConfig(optimizer=optimizer, lr=0.5), gradient=True).step(parameters, rule.result())

    central = model()
    central.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in parameters.items()})
    step = getattr(torch.optim, optimizer)(central.parameters(), lr=0.5)
    cross_entropy(central(torch.from_numpy(x)), torch.from_numpy(y)).backward()
    step.step()
    for name, tensor in central.state_dict().items():
        assert np.abs(tensor.numpy() - stepped[name]).max() < 1e-6


# Laws.


def test_delta_and_parameters_give_the_trained_model_buffers_too():
    task = net_task()
    start = initial_parameters(task)
    result = train(task, start, batch_size=3)
    assert list(result.tree) == list(start)
    moved = {name: apply(start[name], delta) for name, delta in result.tree.items()}
    assert moved["norm.num_batches_tracked"] == 3
    assert moved["norm.num_batches_tracked"].dtype == np.int64
    assert not np.array_equal(moved["norm.running_mean"], start["norm.running_mean"])
    assert result.tree["unused"].tolist() == [0, 0]


def test_fedsgd_sends_zeros_where_there_is_no_gradient_and_deltas_for_buffers():
    result = train(net_task(), algorithm="fedsgd", batch_size=3)
    assert result.tree["unused"].tolist() == [0, 0]
    assert result.tree["norm.num_batches_tracked"] == 3
    assert np.abs(result.tree["first.weight"]).max() > 0


def test_frozen_parameters_do_not_move():
    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.first.requires_grad_(requires_grad=False)

    for algorithm in ("fedavg", "fedsgd"):
        tree = train(net_task(model=Frozen), algorithm=algorithm).tree
        assert not tree["first.weight"].any()
        assert tree["last.weight"].any()


def test_tied_weights_send_the_same_gradient_under_both_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    task = Task(name="tied", model=Tied, loss=cross_entropy, train_data=net_data)
    assert buffer_names(task) == ()
    tree = train(task, algorithm="fedsgd").tree
    assert tree["a.weight"].any()
    assert np.array_equal(tree["a.weight"], tree["b.weight"])


@pytest.mark.parametrize("n", [1 + 4, 1 + 8])
def test_a_last_batch_of_one_sample_is_no_trouble_for_batch_norm(n):
    assert train(net_task(n), batch_size=4).weight == n
    assert train(net_task(n), batch_size=4, algorithm="fedsgd").weight == n


def test_training_is_a_function_of_config_round_and_client():
    task = net_task(30)
    first = train(task, batch_size=4, epochs=2)
    assert same(train(task, batch_size=4, epochs=2).tree, first.tree)
    for other in ({"round": 2}, {"client": "b"}, {"seed": 1}):
        assert not same(train(task, batch_size=4, epochs=2, **other).tree, first.tree)


def test_the_global_random_state_is_neither_read_nor_moved():
    task = net_task(30)
    torch.manual_seed(1)
    first = train(task, batch_size=4)
    torch.manual_seed(2)
    random.seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert same(train(task, batch_size=4).tree, first.tree)
    initial_parameters(task)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_seeds_are_the_same_in_every_process():
    code = "from edgefl.training.local import derive_seed; print(derive_seed(1, 2, 'device-3'))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert int(printed) == derive_seed(1, 2, "device-3")


def test_the_parameters_given_are_left_as_they_are():
    task = net_task()
    start = {name: array.copy() for name, array in initial_parameters(task).items()}
    for array in start.values():
        array.flags.writeable = False  # as a mapped file's are
    kept = {name: array.copy() for name, array in start.items()}
    for algorithm in ("fedavg", "fedsgd"):
        train(task, start, algorithm=algorithm)
    assert same(start, kept)


def test_initial_parameters_depend_on_the_seed_alone():
    task = net_task()
    assert same(initial_parameters(task, 5), initial_parameters(task, 5))
    assert not same(initial_parameters(task, 5), initial_parameters(task, 6))


def test_buffers():
    task = net_task()
    assert buffer_names(task) == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def test_threads_are_set_for_the_process():
    before = torch.get_num_threads()
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(before)


def test_nan_in_the_data_is_left_to_the_guard():
    result = train(line_task(np.full((2, 1), np.nan)))
    assert np.isnan(result.tree["w"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_results_come_back_to_the_cpu():
    result = train(net_task(), batch_size=3)
    assert all(isinstance(array, np.ndarray) for array in result.tree.values())


# Enemies.


def fit_task(fit, initial=None):
    return Task(name="own", initial=initial or (lambda: {"w": np.zeros(2, np.float32)}), fit=fit)


def test_a_fit_of_the_users_own():
    def fit(parameters, config, options):
        return FitResult(
            tree={"w": parameters["w"] + config.lr}, weight=int(options["n"]), metrics={"m": np.float32(1)}
        )

    result = train(fit_task(fit), options={"n": "3"}, lr=0.5)
    assert (result.tree["w"].tolist(), result.weight, result.metrics) == ([0.5, 0.5], 3.0, {"train_m": 1.0})
    assert buffer_names(fit_task(fit)) == ()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "fit returned a NoneType, not an edgefl.FitResult"),
        (FitResult(tree=None, weight=1), "not a tree"),
        (FitResult(tree={}, weight=1), "not a tree"),
        (FitResult(tree={"w": [1.0, 2.0]}, weight=1), "'w' is a list, not a numpy array"),
        (FitResult(tree={"v": np.zeros(2, np.float32)}, weight=1), "tensors missing: w"),
        (FitResult(tree={"w": np.zeros(1, np.float32)}, weight=1), r"float32\[1\], not float32\[2\]"),
        (FitResult(tree={"w": np.zeros(2)}, weight=1), r"float64\[2\], not float32\[2\]"),
        (FitResult(tree={"w": np.zeros(2, np.float32)}, weight=0), "weight 0.0 must be"),
        (FitResult(tree={"w": np.zeros(2, np.float32)}, weight=float("nan")), "weight nan must be"),
        (FitResult(tree={"w": np.zeros(2, np.float32)}, weight="many"), "must be numbers"),
        (FitResult(tree={"w": np.zeros(2, np.float32)}, weight=1, metrics={"m": "good"}), "must be numbers"),
        (FitResult(tree={"w": np.zeros(2, np.float32)}, weight=1, metrics=None), "must be numbers"),
    ],
)
def test_nonsense_from_fit(returned, message):
    with pytest.raises(TaskError, match=message):
        train(fit_task(lambda *_: returned))


def test_nonsense_from_initial():
    with pytest.raises(TaskError, match="initial returned a list"):
        initial_parameters(fit_task(print, lambda: [1]))


def test_a_fit_that_raises():
    def fit(*_):
        raise RuntimeError("out of cheese")

    with pytest.raises(TaskError, match=rf"task 'own': fit raised RuntimeError: out of cheese \({__file__}:\d+\)"):
        train(fit_task(fit))


def test_a_forward_that_raises_is_told_with_the_users_line():
    with pytest.raises(TaskError, match=rf"local training raised RuntimeError: mat1 and mat2 .* \({__file__}:\d+\)"):
        train(net_task(train_data=lambda: (np.zeros((4, 5)), np.zeros(4, np.int64))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": lambda o, t: 1.0}, "loss returned float"),
        ({"loss": lambda o, t: (o - t) ** 2}, r"loss returned shape \[2, 1\]"),
        ({"loss": lambda o, t: torch.tensor(1.0)}, "local training raised RuntimeError"),
        ({"model": lambda: 3}, "model returned a int, not a torch.nn.Module"),
        ({"optimizer": lambda p, lr: None}, "local training raised AttributeError"),
    ],
)
def test_parts_of_a_task_that_are_nonsense(changes, message):
    with pytest.raises(TaskError, match=message):
        train(line_task(**changes), {"w": np.array(1.0, np.float32)})


def test_parameters_of_another_model():
    with pytest.raises(
        TaskError, match=r"not the parameters of its model: tensor 'w' is float32\[1\], not float32\[\]"
    ):
        train(line_task(), {"w": np.ones(1, np.float32)})
