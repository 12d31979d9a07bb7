"""Low rank on real processes: exact at mixed ranks through regions, also over kills; adapters on their base."""

import json
import random
import signal

import numpy as np
import pytest

from edgefl.trees import SpooledTree, factors_of
from tests.e2e.tasks.low_rank.low_rank_task import COLUMNS, ROWS, factors

DEVICES = {f"d{number}": (4 + 4 * (number % 2), 1 + 3 * number) for number in range(8)}  # rank, weight
ROUNDS = 2
COHORT = ("rounds.clients=8", "rounds.quorum=8", "rounds.deadline_s=300")


def centralised():
    """Return sum_k w_k B_k A_k / sum_k w_k, added up over the rounds, by numpy alone."""
    total, weight = np.zeros((ROWS, COLUMNS)), sum(one for _, one in DEVICES.values())
    for number in range(1, ROUNDS + 1):
        for position, (rank, own) in enumerate(DEVICES.values()):
            left, right = factors(position, rank, number)
            total += own / weight * (left.astype(np.float64) @ right.astype(np.float64))
    return total


@pytest.fixture
def two_regions(builtin_fleet):
    fleet = builtin_fleet
    for region in ("r1", "r2"):
        fleet.start_region(region)
    for position, name in enumerate(DEVICES):
        fleet.enroll(name, region=f"r{1 + position // 4}")
    return fleet


def start_devices(fleet, **more):
    for position, (name, (rank, weight)) in enumerate(DEVICES.items()):
        fleet.restart_agent(name, number=position, rank=rank, weight=weight, **more)


def assert_exact(model):
    wanted = centralised()
    assert np.abs(wanted).max() > 0.1
    assert np.abs(model["up@lora"] - wanted).max() <= 1e-6
    weights = [weight for _, weight in DEVICES.values()]
    np.testing.assert_allclose(model["head"], ROUNDS * np.average(np.arange(8), weights=weights), rtol=1e-6)


def test_eight_devices_of_ranks_4_and_8_in_two_regions_equal_the_centralised_sum(two_regions):
    start_devices(two_regions)
    result, model = two_regions.run_task("low_rank", *COHORT, rounds=ROUNDS)
    assert_exact(model)
    assert [entry["admitted"] for entry in result["rounds"]] == [8] * ROUNDS
    assert result["rounds"][1]["metrics"]["train_moved"] > 0.05  # devices began with the matrix of round 1
    # 48 of rank in a round, of a matrix of 96 x 80: it is whole after the first.
    assert factors_of(model, "up@lora") is None
    first = result["rounds"][0]
    assert first["down_bytes"] < 8 * 2000  # of rank 0
    whole = 4 * ROWS * COLUMNS
    assert sum(one["up_bytes"] for one in first["regions"].values()) < 8 * whole


@pytest.mark.soak
def test_a_region_that_is_killed_in_mid_round_changes_nothing(two_regions):
    start_devices(two_regions, seconds=1.5)
    run = two_regions.start_run("low_rank", *COHORT, rounds=ROUNDS)
    moments, seen = random.Random(3), 0
    for name in ("r1", "r2"):
        seen = two_regions.cloud.wait_for("round.open", after=seen)
        with pytest.raises(Exception, match="did not say"):
            two_regions.cloud.wait_for("no such line", moments.uniform(0.2, 2.0), after=seen)
        two_regions.regions[name].signal(signal.SIGKILL)
        two_regions.regions[name].kill()
        two_regions.start_region(name)
    _, model = two_regions.finish_run(run)
    assert_exact(model)


@pytest.mark.soak
def test_an_adapter_is_rolled_out_on_its_base(embedded_fleet, tmp_path):
    fleet, task = embedded_fleet, "tests/e2e/tasks/lora"
    for number, name in enumerate(("a", "b")):
        fleet.add_agent(name, part=number, parts=2, lora_rank=(1, 2)[number])
    cloud = ("--cloud", fleet.url)
    fleet.command(
        "models", "publish", "tiny", "--task", task, "--untrained", "--compress", "none", *cloud, timeout_s=300
    )
    fleet.command("rollout", "start", "tiny", "--wait", 120, *cloud, timeout_s=200)
    result, model = fleet.run_task("lora", "train.lr=0.3", rounds=2)
    assert result["rounds"][-1]["admitted"] == 2
    assert np.abs(model["base_model.model.down@lora"]).max() > 1e-3
    said = fleet.command(
        "models", "publish", "tiny", "--task", task, "--parameters", fleet.folder / "model.safetensors", "--base", 1,
        "--rank", 2, *cloud, timeout_s=300,
    )  # fmt: skip
    assert "an adapter on version 1: a device that has it fetches" in said
    seen = [agent.num_lines() for agent in fleet.agents.values()]
    fleet.command("rollout", "start", "tiny", "--wait", 120, *cloud, timeout_s=200)
    for agent, before in zip(fleet.agents.values(), seen, strict=True):
        agent.wait_for("release.patched", after=before)
    # A second adapter on the same base: its file was kept, although its slot is used again.
    fleet.command(
        "models", "publish", "tiny", "--task", task, "--parameters", fleet.folder / "model.safetensors", "--base", 1,
        "--rank", 1, *cloud, timeout_s=300,
    )  # fmt: skip
    seen = [agent.num_lines() for agent in fleet.agents.values()]
    fleet.command("rollout", "start", "tiny", "--wait", 120, *cloud, timeout_s=200)
    for agent, before in zip(fleet.agents.values(), seen, strict=True):
        agent.wait_for("release.patched", after=before)
    out = tmp_path / "adapter"
    fleet.command("models", "adapter", "--task", task, "--parameters", fleet.folder / "model.safetensors", "--out", out)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "base_model.model.down.lora_A.weight" in SpooledTree(out / "adapter_model.safetensors")
