"""LoRA adapters in simulations: the mean of products, in each engine, with tiers, from a checkpoint, in bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgefl
from edgefl.config import JobConfig, config_of
from edgefl.errors import ConfigError
from edgefl.training.adapters import rank_of
from edgefl.training.local import train_locally
from edgefl.training.parts import Parts, parts_of
from edgefl.trees import Array, EncodedTree, SpooledTree, Tree, encoded_bytes, factors_of
from tests.e2e.tasks.lora import lora_task

FOLDER = Path(lora_task.__file__).parent
UP, DOWN = "base_model.model.up@lora", "base_model.model.down@lora"
CLIENTS, ROUNDS = 6, 2
SETTINGS: dict[str, Any] = {
    "rounds.count": ROUNDS, "train.steps": 3, "train.lr": 0.3, "train.lora_ranks": [1, 4], "train.batch_size": 8,
}  # fmt: skip


def simulated(**changes: Any) -> edgefl.SimulationResult:
    engine, more = changes.pop("engine", "loop"), changes.pop("set", {})
    return edgefl.simulate(str(FOLDER), clients=CLIENTS, engine=engine, set={**SETTINGS, **more}, **changes)


def options(number: int) -> dict[str, str]:
    return {"part": str(number), "parts": str(CLIENTS)}


def centralised(names: list[str]) -> tuple[dict[str, Array], list[int]]:
    """Return the matrices after all rounds, and a round's ranks: sum_k w_k B_k A_k by numpy alone, client by client."""
    config = config_of(JobConfig, None, SETTINGS)
    parts = parts_of(lora_task.task)
    parameters: Tree = parts.moving
    ranks: list[int] = []
    for number in range(1, ROUNDS + 1):
        train = dataclasses.replace(config.train, round=number)
        total = {name: np.zeros(parameters[name].shape) for name in parameters}
        weight = 0.0
        for index, client in enumerate(names):
            result = train_locally(
                lora_task.task, parameters, train, options=options(index), round=number, client=client,
                frozen=parts.frozen,
            )  # fmt: skip
            weight += result.weight
            for name in total:
                pair = factors_of(result.tree, name)
                move = result.tree[name] if pair is None else pair.left.astype(np.float64) @ pair.right
                total[name] += result.weight * move
            ranks.append(rank_of("lora", train, {}, client) or 0)
        parameters = {name: (parameters[name] + total[name] / weight).astype(np.float32) for name in total}
    return dict(parameters), ranks[: len(names)]


@pytest.fixture(scope="module")
def by_loop() -> edgefl.SimulationResult:
    return simulated()


def test_the_loop_equals_the_centralised_mean_of_products(by_loop: edgefl.SimulationResult) -> None:
    wanted, ranks = centralised([f"client-{number}" for number in range(CLIENTS)])
    assert set(ranks) == {1, 4}
    assert np.abs(wanted[DOWN]).max() > 1e-2
    for name, one in wanted.items():
        assert np.abs(by_loop.parameters[name] - one).max() <= 1e-6, name
    assert by_loop.rounds[-1].metrics.keys() >= {"train_loss", "accuracy", "devices/accuracy"}


def test_engines_agree(by_loop: edgefl.SimulationResult) -> None:
    for engine in ("pool", "auto"):
        other = simulated(engine=engine)
        for name in (UP, DOWN):
            assert np.abs(other.parameters[name] - by_loop.parameters[name]).max() <= 1e-5, (engine, name)
    with pytest.raises(ConfigError, match=r"cannot run task 'lora': its adapters .* are averaged as products"):
        simulated(engine="stacked")


def test_tiers_and_checkpoints_change_nothing(by_loop: edgefl.SimulationResult, tmp_path: Path) -> None:
    tiered = simulated(set={"tiers.fan_out": [2, 2]})
    assert np.abs(tiered.parameters[DOWN] - by_loop.parameters[DOWN]).max() <= 1e-6
    simulated(set={"rounds.count": 1}, checkpoint=tmp_path)
    resumed = simulated(resume=tmp_path, config=None)
    assert np.array_equal(resumed.parameters[DOWN], by_loop.parameters[DOWN])
    assert len(resumed.rounds) == ROUNDS


def test_regional_rounds_return_the_whole_change(by_loop: edgefl.SimulationResult) -> None:
    regional = simulated(set={"tiers.fan_out": [CLIENTS], "tiers.region_rounds": 2, "rounds.count": 1})
    # One region of all clients, twice, is two rounds without regions.
    assert np.abs(regional.parameters[DOWN] - by_loop.parameters[DOWN]).max() <= 1e-6


def test_bytes_are_those_of_factors_and_the_model_is_written_with_them(
    by_loop: edgefl.SimulationResult, tmp_path: Path
) -> None:
    parts: Parts = parts_of(lora_task.task)
    first = by_loop.rounds[0]
    down = CLIENTS * (encoded_bytes(parts.moving) + encoded_bytes(parts.frozen))
    assert first.down_bytes == down
    assert first.up_bytes < CLIENTS * (4 * 24 * 32 + 2000)
    few = simulated(set={"rounds.count": 1, "train.lora_ranks": [1]}, out=tmp_path / "model.safetensors")
    written = SpooledTree(tmp_path / "model.safetensors")
    assert DOWN in written.factored  # 6 factors of rank 1, of a matrix of 24 x 24
    assert UP not in written.factored  # which is as large as its factors
    assert isinstance(few.parameters, EncodedTree)
    assert np.array_equal(written[DOWN], few.parameters[DOWN])
