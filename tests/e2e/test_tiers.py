"""Devices below regions, and regions below regions: real processes compute what a flat fleet does, also after kills."""

import random
import signal

import numpy as np
import pytest

PLACES = {"a": "r1", "b": "r1", "c": "r2", "d": "r2a"}
DEVICES = {"a": (1.0, 1), "b": (4.0, 2), "c": (10.0, 5), "d": (-3.0, 8)}  # delta, weight
MEAN = sum(delta * weight for delta, weight in DEVICES.values()) / sum(weight for _, weight in DEVICES.values())
COHORT = ("rounds.clients=4", "rounds.quorum=4")


@pytest.fixture
def tree(builtin_fleet, tmp_path):
    """A cloud with r1 and r2, r2a below r2, and four devices below them, of unequal weights."""
    fleet = builtin_fleet
    fleet.start_region("r1")
    fleet.start_region("r2")
    fleet.start_region("r2a", parent="r2")
    for name, region in PLACES.items():
        fleet.enroll(name, region=region)

    def start(**more):
        for name, (delta, weight) in DEVICES.items():
            fleet.restart_agent(name, delta=delta, weight=weight, calls=tmp_path / f"{name}.calls", **more)

    fleet.start_devices = start
    return fleet


def assert_exact(result, model, rounds):
    np.testing.assert_allclose(model["w"], np.full(3, rounds * MEAN), rtol=1e-6)
    assert model["n"] == rounds
    assert [entry["admitted"] for entry in result["rounds"]] == [4] * rounds
    for entry in result["rounds"]:
        assert {"rejected": 0, "failed": 0, "missing": 0, "reasons": {}}.items() <= entry.items()
        np.testing.assert_allclose(entry["metrics"]["train_delta"], MEAN, rtol=1e-6)


def test_the_mean_is_that_of_a_flat_fleet_and_each_is_counted_once(tree, tmp_path):
    tree.start_devices()
    result, model = tree.run_task("numbers", *COHORT, rounds=2)
    assert_exact(result, model, 2)
    assert [(tmp_path / f"{name}.calls").read_text() for name in DEVICES] == ["fit\nfit\n"] * 4
    assert all(entry["up_bytes"] > 0 for entry in result["rounds"])


def test_a_region_that_is_killed_in_mid_round_changes_nothing(tree, tmp_path):
    """SIGKILL of each tier in turn at a random moment, then the same home again."""
    tree.start_devices(seconds=2.0)
    run = tree.start_run("numbers", *COHORT, "rounds.deadline_s=300", rounds=3)
    moments = random.Random(7)
    seen = 0
    for name in ("r2a", "r1", "r2"):
        seen = tree.cloud.wait_for("round.open", after=seen)
        run_for_s = moments.uniform(0.2, 2.5)
        with pytest.raises(Exception, match="did not say"):
            tree.cloud.wait_for("no such line", run_for_s, after=seen)
        tree.regions[name].signal(signal.SIGKILL)
        tree.regions[name].kill()
        tree.start_region(name)
    result, model = tree.finish_run(run)
    assert_exact(result, model, 3)


@pytest.mark.soak
def test_a_parent_that_is_away_in_mid_round_changes_nothing(tree):
    tree.start_devices(seconds=2.0)
    run = tree.start_run("numbers", *COHORT, "rounds.deadline_s=300", rounds=2)
    tree.cloud.wait_for("round.open")
    tree.cloud.signal(signal.SIGKILL)
    tree.cloud.kill()
    tree.start_cloud()
    result, model = tree.finish_run(run)
    assert_exact(result, model, 2)


DEADLINE_S = 25.0


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "mode",
    [(), ("tiers.region_rounds=2",), ("rounds.grace=auto",), ("rounds.late=next",), ("server.wire=bf16",)],
    ids=["regions", "region rounds", "grace", "late", "wire"],
)
def test_who_is_dead_for_good_ends_no_job_and_no_deadline(tree, tmp_path, mode):
    """First a device, then a region, which never come back; the rest is counted in each round."""
    tree.start_devices(seconds=0.5)
    settings = ("rounds.clients=4", "rounds.quorum=1", f"rounds.deadline_s={DEADLINE_S}", "rounds.offline_grace_s=2")
    if "rounds.late=next" in mode:  # not below regions
        for name in PLACES:
            tree.agents[name].stop()
            tree.command("devices", "assign", name, "--parents", "cloud")
            delta, weight = DEVICES[name]
            tree.restart_agent(name, delta=delta, weight=weight, calls=tmp_path / f"{name}.calls", seconds=0.5)
    run = tree.start_run("numbers", *settings, *mode, rounds=8)
    seen = tree.cloud.wait_for("round.done")
    tree.agents["a"].signal(signal.SIGKILL)
    tree.agents["a"].kill()
    tree.cloud.wait_for("round.done", after=seen + 1)
    tree.regions["r2"].signal(signal.SIGKILL)  # and with it r2a below it
    tree.regions["r2"].kill()
    result, _ = tree.finish_run(run)
    assert len(result["rounds"]) == 8
    assert all(entry["admitted"] >= 1 for entry in result["rounds"])
    assert max(entry["seconds"] for entry in result["rounds"]) <= DEADLINE_S + 1
    assert result["rounds"][-1]["admitted"] == (3 if "rounds.late=next" in mode else 1)
