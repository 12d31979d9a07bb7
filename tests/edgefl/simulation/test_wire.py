"""Models and updates in fewer bits: by hand, in every engine, in bytes, and how near they come to exact ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgefl
from edgefl.config import TrainConfig
from edgefl.errors import ConfigError
from edgefl.task import load_task
from edgefl.training.local import as_sent, initial_parameters, train_locally
from edgefl.trees import Tree, apply, encoded_bytes, in_form

TASK = """
import torch

from edgefl import Task

def load(part, parts):
    rng = torch.Generator().manual_seed(int(part))
    inputs = torch.randn(48, 64, generator=rng)
    return inputs, (inputs[:, :1] > 0).long().squeeze(1) * (1 + int(part) % 2)

def model():
    return torch.nn.Sequential(torch.nn.Linear(64, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))

task = Task(name="rows", model=model, loss=torch.nn.functional.cross_entropy, train_data=load)
adam = Task(
    name="rows", model=model, loss=torch.nn.functional.cross_entropy, train_data=load,
    optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
)
"""
NAMES, ROUNDS = ("client-0", "client-1", "client-2"), 3
SETTINGS = {"rounds.count": ROUNDS, "population.clients": len(NAMES), "train.lr": 0.05, "train.batch_size": 8}
WIRES = [("bf16", "exact"), ("int8", "exact"), ("exact", "bf16"), ("int8", "bf16")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("task", "adam"):
        found[name] = tmp_path_factory.mktemp(name)
        (found[name] / "rows_task.py").write_text(TASK)
        (found[name] / "pyproject.toml").write_text(f'[tool.edgefl]\ntask = "rows_task:{name}"\n')
    return found


def simulated(folder: Path, engine: str = "loop", **more: Any) -> edgefl.SimulationResult:
    settings = SETTINGS | {key.replace("__", "."): value for key, value in more.items()}
    return edgefl.simulate(folder, engine=engine, set=settings)


def by_hand(folder: Path, up: str, down: str) -> tuple[Tree, int]:
    """Train as devices do on what they receive, and add the mean of what they send; return the bytes, too."""
    task = load_task(str(folder))
    model, moved_bytes = dict(initial_parameters(task)), 0
    for number in range(1, ROUNDS + 1):
        config = TrainConfig(round=number, lr=0.05, batch_size=8, wire=up)
        received = in_form(model, down)
        sent, weights = [], []
        for part, client in enumerate(NAMES):
            options = {"part": str(part), "parts": str(len(NAMES))}
            result = train_locally(task, received, config, options=options, round=number, client=client)
            sent.append(as_sent(result.tree, config, number, client))
            weights.append(result.weight)
            moved_bytes += encoded_bytes(received) + encoded_bytes(sent[-1])
        for name, old in model.items():
            mean = sum(w * one[name].astype(np.float64) for w, one in zip(weights, sent, strict=True)) / sum(weights)
            model[name] = apply(old, np.asarray(mean, old.dtype))
    return model, moved_bytes


@pytest.mark.parametrize("engine", ["loop", "pool"])
@pytest.mark.parametrize(("up", "down"), WIRES)
def test_it_is_what_devices_and_a_server_do_by_hand(
    folders: dict[str, Path], engine: str, up: str, down: str
) -> None:  # fmt: skip
    """With an optimizer, the engines' updates have the same bits as a device's, so the rounding has, too."""
    result = simulated(folders["adam"], engine, train__wire=up, server__wire=down)
    wanted, moved_bytes = by_hand(folders["adam"], up, down)
    for name, array in wanted.items():
        np.testing.assert_allclose(result.parameters[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert sum(one.up_bytes + one.down_bytes for one in result.rounds) == moved_bytes


@pytest.mark.parametrize(("up", "down"), WIRES)
def test_stacked_clients_send_the_same_to_a_few_steps(folders: dict[str, Path], up: str, down: str) -> None:
    """A gradient that differs in its last bit may be rounded to the next int8."""
    loop, stacked = (simulated(folders["task"], one, train__wire=up, server__wire=down) for one in ("loop", "stacked"))
    exact = simulated(folders["task"])
    off = max(float(np.abs(exact.parameters[name] - loop.parameters[name]).max()) for name in exact.parameters)
    for name, array in loop.parameters.items():
        same = np.isclose(stacked.parameters[name], array, rtol=0, atol=1e-6)
        assert same.mean() > 0.98, name
        np.testing.assert_allclose(stacked.parameters[name], array, rtol=0, atol=4 * off)
    assert [one.up_bytes for one in loop.rounds] == [one.up_bytes for one in stacked.rounds]


def test_fewer_bits_are_near_the_exact_model_and_cost_their_share(folders: dict[str, Path]) -> None:
    exact = simulated(folders["task"])
    up, down = exact.rounds[-1].up_bytes, exact.rounds[-1].down_bytes
    moved = max(
        float(np.abs(exact.parameters[name] - first).max())
        for name, first in initial_parameters(load_task(str(folders["task"]))).items()
    )
    for wires, up_share, down_share, within in (
        ({"train__wire": "bf16"}, 0.55, 1.0, 0.01), ({"train__wire": "int8"}, 0.33, 1.0, 0.05),
        ({"server__wire": "bf16"}, 1.0, 0.55, 0.05),
    ):  # fmt: skip
        found = simulated(folders["task"], **wires)
        assert found.rounds[-1].up_bytes <= up_share * up
        assert found.rounds[-1].down_bytes <= down_share * down
        for name, array in exact.parameters.items():
            np.testing.assert_allclose(found.parameters[name], array, rtol=0, atol=within * moved)
        assert found.final["train_loss"] == pytest.approx(exact.final["train_loss"], rel=0.02)


def test_below_regions_devices_send_fewer_bits_and_regions_their_sums_as_they_are(folders: dict[str, Path]) -> None:
    flat = simulated(folders["adam"], train__wire="int8", server__wire="bf16")
    below = simulated(folders["adam"], train__wire="int8", server__wire="bf16", tiers__fan_out=[2])
    exact = simulated(folders["adam"], tiers__fan_out=[2])
    for name, array in flat.parameters.items():
        np.testing.assert_allclose(below.parameters[name], array, rtol=0, atol=1e-6)
    assert below.rounds[-1].up_bytes == exact.rounds[-1].up_bytes  # into the cloud: two sums
    assert below.rounds[-1].down_bytes < 0.55 * exact.rounds[-1].down_bytes


def test_what_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"train.wire='int4' is not one of: exact, bf16, int8"):
        simulated(folders["task"], train__wire="int4")
    with pytest.raises(ConfigError, match=r"server.wire='int8' is not one of: exact, bf16"):
        simulated(folders["task"], server__wire="int8")
    with pytest.raises(ConfigError, match=r"server.wire='bf16' needs tiers.region_rounds=1"):
        simulated(folders["task"], server__wire="bf16", tiers__region_rounds=2, tiers__fan_out=[2])
