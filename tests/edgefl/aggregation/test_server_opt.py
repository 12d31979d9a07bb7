"""The server's step: plain SGD by hand, everything else equal to torch.optim, and resumable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgefl.aggregation.large_step import ELEMENTWISE
from edgefl.aggregation.server_opt import _BUCKET_ELEMENTS, ServerOptimizer
from edgefl.errors import ConfigError
from edgefl.settings.server import ServerConfig
from edgefl.trees import Tree, bfloat16

START = {"w": np.array([1.0, 2.0], np.float32), "s": np.array(3.0, np.float32)}
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "SGD", "lr": 0.5, "options": {"momentum": 0.9}},
    {"optimizer": "SGD", "lr": 0.5, "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}},
    {"optimizer": "Adam", "lr": 0.1, "options": {"betas": [0.9, 0.99], "eps": 1e-3}},
    {"optimizer": "AdamW", "lr": 0.1, "options": {}},
    {"optimizer": "Adagrad", "lr": 0.1, "options": {}},
    {"optimizer": "RMSprop", "lr": 0.1, "options": {"momentum": 0.5}},
]


def make(settings: dict[str, Any], *, gradient: bool = False, buffers: tuple[str, ...] = ()) -> ServerOptimizer:
    return ServerOptimizer(ServerConfig(**settings), gradient=gradient, buffers=buffers)


def means(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{n: np.asarray(rng.normal(size=a.shape), a.dtype) for n, a in START.items()} for _ in range(count)]


def torch_itself(settings: dict[str, Any], rounds: list[dict[str, np.ndarray]], *, gradient: bool) -> Tree:
    parameters = {n: torch.nn.Parameter(torch.from_numpy(np.array(a))) for n, a in START.items()}
    kind = getattr(torch.optim, settings["optimizer"])
    optimizer = kind(list(parameters.values()), lr=settings["lr"], **settings["options"])
    for mean in rounds:
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(mean[name]) if gradient else -torch.from_numpy(mean[name])
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def run(optimizer: ServerOptimizer, rounds: list[dict[str, np.ndarray]], parameters: Tree = START) -> Tree:
    for mean in rounds:
        parameters = optimizer.step(parameters, mean)
    return parameters


def test_lr_1_is_fedavg_by_hand() -> None:
    new = make({}).step({"w": np.array([1.0, 2.0], np.float32)}, {"w": np.array([0.5, -1.0], np.float32)})
    assert new["w"].tolist() == [1.5, 1.0]
    assert new["w"].dtype == np.float32


def test_fedsgd_goes_against_the_gradient_by_hand() -> None:
    optimizer = make({"lr": 0.5}, gradient=True)
    new = optimizer.step({"w": np.array([1.0], np.float32)}, {"w": np.array([4.0], np.float32)})
    assert new["w"].tolist() == [-1.0]  # 1 - 0.5 * 4


def test_the_parameters_given_are_not_changed() -> None:
    run(make({}), means(2))
    run(make(OPTIMIZERS[0]), means(2))
    assert START["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("gradient", [True, False])
def test_every_other_optimizer_is_torchs(settings: dict[str, Any], gradient: bool) -> None:
    rounds = means(4)
    seen = run(make(settings, gradient=gradient), rounds)
    wanted = torch_itself(settings, rounds, gradient=gradient)
    for name, array in wanted.items():
        assert isinstance(seen[name], np.ndarray)
        assert (seen[name].dtype, seen[name].shape) == (array.dtype, array.shape)
        assert np.allclose(seen[name], array, rtol=1e-6)


def test_momentum_by_hand() -> None:
    optimizer = make({"lr": 1.0, "options": {"momentum": 0.5}})
    one = {"w": np.array([1.0], np.float32)}
    moved = run(optimizer, [one, one], {"w": np.array([0.0], np.float32)})
    assert moved["w"].tolist() == [2.5]  # 1, then 1 + (0.5 * 1 + 1)


@pytest.mark.parametrize("settings", [{}, *OPTIMIZERS], ids=str)
@pytest.mark.parametrize("interrupted_after", [0, 1, 3])
def test_a_restored_run_equals_an_undisturbed_one(settings: dict[str, Any], interrupted_after: int) -> None:
    rounds = means(5)
    whole = run(make(settings), rounds)
    first, second = make(settings), make(settings)
    half = run(first, rounds[:interrupted_after])
    second.load(first.state())
    assert second.state().keys() == first.state().keys()
    seen = run(second, rounds[interrupted_after:], half)
    assert all(np.array_equal(seen[name], whole[name]) for name in whole)


def test_a_state_is_a_snapshot() -> None:
    optimizer = make(OPTIMIZERS[0])
    parameters = run(optimizer, means(1))
    before = {name: array.copy() for name, array in optimizer.state().items()}
    kept = optimizer.state()
    run(optimizer, means(3), parameters)
    assert all(np.array_equal(kept[name], before[name]) for name in before)


def test_plain_sgd_has_no_state() -> None:
    optimizer = make({"lr": 0.1})
    run(optimizer, means(2))
    assert optimizer.state() == {}


@pytest.mark.parametrize("settings", [{"lr": 0.1}, OPTIMIZERS[2]], ids=["numpy", "torch"])
def test_buffers_and_integers_move_by_their_mean_whatever_the_optimizer(settings: dict[str, Any]) -> None:
    start = {
        "running": np.array([1.0], np.float32),
        "n": np.array(5, np.int64),
        "flag": np.array([True, False]),
        "w": np.array([0.0], np.float32),
    }
    mean = {
        "running": np.array([2.0], np.float32),
        "n": np.array(3, np.int64),
        "flag": np.array([True, True]),
        "w": np.array([1.0], np.float32),
    }
    new = make(settings, buffers=("running",)).step(start, mean)
    assert list(new) == list(start)
    assert (new["running"].tolist(), new["n"].tolist(), new["flag"].tolist()) == ([3.0], 8, [False, True])
    assert all(isinstance(new[name], np.ndarray) and new[name].dtype == start[name].dtype for name in start)
    assert new["w"][0] == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_float_dtypes_are_kept(dtype: str) -> None:
    start = {"w": np.ones(3, dtype), "s": np.ones((), dtype)}
    for settings in ({"lr": 0.5}, {"lr": 0.5, "options": {"momentum": 0.9}}):
        mean = {name: array.copy() for name, array in start.items()}
        new = make(settings).step(start, mean)
        assert all((new[n].dtype, new[n].shape) == (a.dtype, a.shape) for n, a in start.items())
        assert all(np.array_equal(array, np.full(array.shape, 1.5)) for array in new.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "Adamm"}, "server.optimizer='Adamm' is not an optimizer of torch.optim"),
        ({"optimizer": "lr_scheduler"}, "is not an optimizer of torch.optim"),
        ({"optimizer": "Optimizer"}, "server.options={}"),
        ({"optimizer": "Adam", "options": {"momentun": 0.9}}, "server.options={'momentun': 0.9}"),
        ({"options": {"momentum": -1.0}}, "server.options={'momentum': -1.0}"),
        ({"optimizer": "LBFGS"}, "server.optimizer='LBFGS' cannot step on its own"),
        ({"optimizer": "SparseAdam"}, "server.optimizer='SparseAdam' cannot step on its own"),
    ],
)
def test_what_cannot_step_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make(settings)
    assert message in str(refusal.value)


class Name(str):
    """A tensor's name that counts how often it is looked up."""

    __slots__ = ()
    hashed = 0

    def __hash__(self) -> int:
        Name.hashed += 1
        return super().__hash__()


@pytest.mark.parametrize("settings", [{}, OPTIMIZERS[2]], ids=["numpy", "torch"])
def test_a_steps_cost_grows_with_the_tensors_not_with_their_square(settings: dict[str, Any]) -> None:
    lookups = []
    for count in (100, 400):
        names = [Name(f"block.{number}.w") for number in range(count)]
        parameters, mean = ({name: np.ones(2, np.float32) for name in names} for _ in range(2))
        optimizer = make(settings)
        Name.hashed = 0
        optimizer.step(parameters, mean)
        lookups.append(Name.hashed)
    assert lookups[1] <= 5 * lookups[0]  # 4 is linear, 16 is square


@pytest.mark.parametrize("settings", [{"lr": 0.5}, OPTIMIZERS[1], OPTIMIZERS[3]], ids=str)
def test_what_is_frozen_stays_whatever_the_optimizer_does_to_weights(settings: dict[str, Any]) -> None:
    start = {"f": np.ones(2, np.float32), "w": np.ones(2, np.float32)}
    optimizer = ServerOptimizer(ServerConfig(**settings), gradient=False, frozen=("f",))
    new: Tree = start
    for _ in range(3):
        new = optimizer.step(new, {name: np.full(2, 0.1, np.float32) for name in start})
    assert new["f"].tolist() == [1.0, 1.0]
    assert new["w"].tolist() != [1.0, 1.0]


@pytest.mark.parametrize("settings", [{"optimizer": "SGD", "lr": 0.5}, *OPTIMIZERS])
def test_bfloat16_steps_as_torch_does_and_its_state_comes_back(settings: dict[str, Any]) -> None:
    start = {"w": np.array([1.0, 2.0], bfloat16()), "s": np.array(3.0, bfloat16())}
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    optimizer = getattr(torch.optim, settings["optimizer"])(
        [parameter], lr=settings["lr"], **settings.get("options", {})
    )
    step, tree = make(settings), dict(start)
    for _ in range(2):
        parameter.grad = torch.tensor([-0.5, 0.25], dtype=torch.bfloat16)
        optimizer.step()
        resumed = make(settings)
        resumed.load({name: array.copy() for name, array in step.state().items()})
        step = resumed
        tree = step.step(tree, {"w": np.array([0.5, -0.25], bfloat16()), "s": np.array(0.5, bfloat16())})
    assert (tree["w"].dtype, tree["s"].dtype, tree["s"].shape) == (bfloat16(), bfloat16(), ())
    np.testing.assert_allclose(tree["w"].astype(float), parameter.detach().double().numpy(), rtol=0.02)


MANY = {
    "scalar": np.array(3.0, np.float32),
    "wide": np.linspace(-1, 1, 12, dtype=np.float64).reshape(3, 4),
    "empty": np.empty((0, 2), np.float32),
    "large": np.linspace(-1, 1, _BUCKET_ELEMENTS + 1, dtype=np.float32),
    **{f"small.{i}": np.linspace(-1, 1, 2 * i + 1, dtype=np.float32) for i in range(40)},
}


NOT_EMPTY = {name: array for name, array in MANY.items() if array.size}  # Adafactor divides by a tensor's size


def many_means() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{n: np.asarray(rng.normal(size=a.shape), a.dtype) for n, a in MANY.items()} for _ in range(3)]


def of_torch(kind: str, rounds: list[dict[str, np.ndarray]], start: Tree = MANY) -> tuple[torch.optim.Optimizer, Tree]:
    parameters = {n: torch.nn.Parameter(torch.from_numpy(np.array(a))) for n, a in start.items()}
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)(list(parameters.values()), lr=0.1)
    for mean in rounds:
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(mean[name])
        optimizer.step()
    return optimizer, {name: parameter.detach().numpy() for name, parameter in parameters.items()}


@pytest.mark.parametrize("kind", sorted({*ELEMENTWISE, "Adafactor"} - {"SGD"}))
def test_tensors_side_by_side_step_as_each_by_itself(kind: str) -> None:
    optimizer, rounds, start = make({"optimizer": kind, "lr": 0.1}, gradient=True), many_means(), NOT_EMPTY
    seen = run(optimizer, rounds, start)
    for name, array in of_torch(kind, rounds, start)[1].items():
        assert (seen[name].dtype, seen[name].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(seen[name], array, rtol=1e-6, atol=1e-7)


def test_small_tensors_of_one_dtype_are_one_of_torchs() -> None:
    adam, adafactor = (make({"optimizer": kind, "lr": 0.1}) for kind in ("Adam", "Adafactor"))
    adam.step(MANY, many_means()[0])
    adafactor.step(NOT_EMPTY, many_means()[0])
    whole = {"0": 1, "1": 12, "2": 0, "3": _BUCKET_ELEMENTS + 1, "4": 40 * 40}
    assert {key[0]: array.size for key, array in adam.state().items() if key.endswith("exp_avg")} == whole
    assert len({key.partition(".")[0] for key in adafactor.state()}) == len(NOT_EMPTY)  # looks at rows and columns


@pytest.mark.parametrize("kind", ["ASGD", "Adagrad", "Adam", "NAdam"])
def test_a_state_of_each_tensor_by_itself_is_gone_on_with(kind: str) -> None:
    rounds = many_means()
    whole, half = of_torch(kind, rounds)[1], of_torch(kind, rounds[:2])
    optimizer = make({"optimizer": kind, "lr": 0.1}, gradient=True)
    kept = half[0].state_dict()["state"]
    optimizer.load({f"{i}.{slot}": np.asarray(value) for i, of in kept.items() for slot, value in of.items()})
    seen = run(optimizer, rounds[2:], half[1])
    for name, array in whole.items():
        np.testing.assert_allclose(seen[name], array, rtol=1e-6, atol=1e-7)
