"""Rounds of models that are not in memory: the same bits, and the same refusals, as of small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgefl import trees
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import JobConfig, from_dict
from edgefl.errors import StepFailed
from edgefl.records import Plan, Update
from edgefl.rounds import Job, run_rounds
from edgefl.settings.server import ServerConfig
from edgefl.testing import ScriptedClient, ScriptedFleet, make_update
from edgefl.trees import SpooledTree, Tree, write_tree
from edgefl.trees.scratch import ScratchTree


def filed(folder: Path, device: str, weight: float) -> ScriptedClient:
    """A client whose updates come in files, which are gone after the round."""

    def send(plan: Plan) -> Update:
        rng, path = np.random.default_rng(plan.round), folder / f"{device}-{plan.round % 2}"
        with path.open("wb") as file:
            write_tree({"w": rng.normal(size=500).astype(np.float32), "n": np.array([3, 4])}, file)
        return Update(job=plan.job, round=plan.round, device=device, tree=SpooledTree(path), weight=weight)

    return send


@pytest.mark.parametrize("server", [{}, {"lr": 0.1, "optimizer": "Adam"}], ids=["SGD", "Adam"])
def test_rounds_of_a_large_model_have_the_bits_of_a_small_one(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {"w": np.ones(500, np.float32), "n": np.array([1, 2])}

    def parameters() -> list[Tree]:
        fleet = ScriptedFleet({"a": filed(tmp_path, "a", 3.0), "b": filed(tmp_path, "b", 0.5)})
        step = ServerOptimizer(ServerConfig(**server), gradient=False)
        return [one.parameters for one in run_rounds(
            Job(id="job", config=from_dict(JobConfig, {"rounds": {"count": 3}}), step=step), fleet, start)]  # fmt: skip

    small = parameters()
    monkeypatch.setattr(trees, "LARGE_BYTES", 1000)
    monkeypatch.setattr(trees, "BLOCK_ELEMENTS", 77)
    large = parameters()
    assert [isinstance(one, ScratchTree) for one in (*small, *large)] == [False] * 3 + [True] * 3
    for before, after in zip(small, large, strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in start)


def test_a_large_step_out_of_range_fails_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE_BYTES", 0)
    start = {"w": np.full(500, 3e38, np.float32), "n": np.array([1, 2])}
    fleet = ScriptedFleet({"a": lambda plan: make_update("a", round=plan.round, **start)})
    with pytest.raises(StepFailed, match="'w' holds NaN or infinity"):
        next(
            run_rounds(
                Job(id="job", config=JobConfig(), step=ServerOptimizer(ServerConfig(), gradient=False)), fleet, start
            )
        )
