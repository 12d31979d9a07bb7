"""A part of the model per round, on real processes: across kill -9 and below a region, as it is simulated."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Fleet
from tests.e2e.killed_run import run_with_a_kill
from tests.e2e.test_client_state import NAMES, TASK

ROUNDS = 6
SETTINGS = {
    "server.fragments": 2, "train.keep_optimizer_state": True, "train.lr": 0.05, "train.batch_size": 4,
    "rounds.quorum": 3,
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("region", [None, "north"])
def test_killed_agents_go_on_with_their_own_values(embedded_fleet: Fleet, tmp_path: Path, region: str | None) -> None:
    run_with_a_kill(embedded_fleet, tmp_path / "momentum", TASK, SETTINGS, rounds=ROUNDS, region=region)


@pytest.mark.timeout(600)
def test_a_device_that_lost_its_state_gets_the_whole_model(embedded_fleet: Fleet, tmp_path: Path) -> None:
    folder = tmp_path / "momentum"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "momentum:task"\n')
    (folder / "momentum.py").write_text(TASK)
    for index, name in enumerate(NAMES):
        embedded_fleet.add_agent(name, part=index, parts=len(NAMES))
    settings = [f"{key}={str(value).lower()}" for key, value in SETTINGS.items()]
    run = embedded_fleet.start_run(folder, *settings, "rounds.clients=3", "rounds.offline_grace_s=120", rounds=ROUNDS)
    agent = embedded_fleet.agents[NAMES[0]]
    agent.wait_for("update.stored", after=agent.num_lines())
    agent.kill()
    shutil.rmtree(embedded_fleet.folder / NAMES[0] / "states")
    embedded_fleet.restart_agent(NAMES[0], part=0, parts=len(NAMES))
    result, model = embedded_fleet.finish_run(run)
    assert [one["admitted"] for one in result["rounds"]] == [3] * ROUNDS
    assert all(np.isfinite(array).all() for array in model.values())
