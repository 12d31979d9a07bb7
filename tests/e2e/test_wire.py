"""Models and updates in fewer bits, on real processes: across kill -9 and below a region, as it is simulated."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgefl
from tests.e2e.conftest import Fleet
from tests.e2e.killed_run import run_with_a_kill

TASK = """
import time

import torch

from edgefl import Task

def load(part, parts):
    time.sleep(0.3)  # so that a round can be cut
    inputs = torch.randn(24, 64, generator=torch.Generator().manual_seed(int(part)))
    return inputs, inputs[:, :40] * (1 + int(part))

task = Task(
    name="rows", model=lambda: torch.nn.Linear(64, 40), loss=torch.nn.functional.mse_loss, train_data=load,
    optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
)
"""
ROUNDS = 4
SETTINGS = {
    "train.wire": "int8", "server.wire": "bf16", "train.lr": 0.05, "train.batch_size": 8, "rounds.quorum": 3,
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("region", [pytest.param(None, marks=pytest.mark.soak), "north"])
def test_a_killed_agent_sends_the_same_bits(embedded_fleet: Fleet, tmp_path: Path, region: str | None) -> None:
    folder = tmp_path / "rows"
    result = run_with_a_kill(embedded_fleet, folder, TASK, SETTINGS, rounds=ROUNDS, region=region)
    if region is None:  # the killed agent may have fetched twice, or not
        exact = edgefl.simulate(folder, clients=3, rounds=1, engine="loop", set={"train.batch_size": 8})
        assert result["rounds"][-1]["up_bytes"] < 0.4 * exact.rounds[0].up_bytes
        assert result["rounds"][-1]["down_bytes"] < 0.6 * exact.rounds[0].down_bytes
