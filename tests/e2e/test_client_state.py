"""What a device keeps between rounds survives kill -9, and is what a simulated client keeps."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

import edgefl
from tests.e2e.conftest import Fleet

TASK = """
import time

import torch

from edgefl import Task

def load(part, parts):
    time.sleep(0.3)  # so that a round can be cut
    numbers = torch.arange(8.0, dtype=torch.float64).reshape(8, 1) + int(part)
    return numbers, numbers * (1 + int(part))

task = Task(
    name="momentum", model=lambda: torch.nn.Linear(1, 1, dtype=torch.float64), loss=torch.nn.functional.mse_loss,
    train_data=load, optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
)
"""
NAMES = ["client-0", "client-1", "client-2"]
ROUNDS = 6
SETTINGS = {"train.keep_optimizer_state": True, "train.lr": 0.05, "train.batch_size": 4, "rounds.quorum": 3}


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_killed_agents_go_on_with_their_optimizers(embedded_fleet: Fleet, tmp_path: Path) -> None:
    folder = tmp_path / "momentum"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "momentum:task"\n')
    (folder / "momentum.py").write_text(TASK)
    data = {name: {"part": index, "parts": len(NAMES)} for index, name in enumerate(NAMES)}
    for name, options in data.items():
        embedded_fleet.add_agent(name, **options)
    settings = [f"{key}={str(value).lower()}" for key, value in SETTINGS.items()]
    run = embedded_fleet.start_run(folder, *settings, "rounds.clients=3", "rounds.offline_grace_s=120", rounds=ROUNDS)
    for name in NAMES[:2]:
        agent = embedded_fleet.agents[name]
        agent.wait_for("update.made", after=agent.num_lines())
        agent.kill()
        embedded_fleet.restart_agent(name, **data[name])
    result, model = embedded_fleet.finish_run(run)
    assert [one["admitted"] for one in result["rounds"]] == [3] * ROUNDS
    simulated = edgefl.simulate(folder, clients=3, rounds=ROUNDS, engine="loop", set=SETTINGS)
    anew = edgefl.simulate(
        folder, clients=3, rounds=ROUNDS, engine="loop", set=SETTINGS | {"train.keep_optimizer_state": False}
    )
    for name, array in model.items():
        np.testing.assert_allclose(simulated.parameters[name], array, rtol=0, atol=1e-6)
        assert np.abs(anew.parameters[name] - array).max() > 1e-3
    end_s = time.monotonic() + 60
    while any(list((embedded_fleet.folder / name / "states").iterdir()) for name in NAMES):  # the job has ended
        assert time.monotonic() < end_s
        time.sleep(0.1)
