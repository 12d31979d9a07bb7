"""What is killed in mid-round costs time, never correctness."""

import time

import numpy as np
import pytest

from edgefl.local_fleet import LocalFleet


def calls(path):
    return path.read_text().count("fit") if path.exists() else 0


def wait_for_calls(path, wanted, timeout_s=120):
    end = time.monotonic() + timeout_s
    while calls(path) < wanted:
        assert time.monotonic() < end, f"{path} has {calls(path)} calls, not {wanted}"
        time.sleep(0.02)


def test_a_killed_agent_costs_its_update_and_is_back_in_a_later_round(embedded_fleet, tmp_path):
    data = {name: {"delta": delta, "weight": 1, "seconds": seconds, "calls": tmp_path / f"{name}.calls"}
            for name, delta, seconds in (("a", 1, 0.5), ("b", 3, 0.5), ("c", 8, 60))}  # fmt: skip
    for name, options in data.items():
        embedded_fleet.add_agent(name, **options)
    run = embedded_fleet.start_run(
        "numbers", "rounds.clients=3", "rounds.quorum=2", "rounds.offline_grace_s=1", "rounds.deadline_s=50", rounds=5
    )
    wait_for_calls(tmp_path / "c.calls", 1)
    embedded_fleet.agents["c"].kill()
    embedded_fleet.restart_agent("c", **data["c"] | {"seconds": 0})
    result, _ = embedded_fleet.finish_run(run)
    admitted = [entry["admitted"] for entry in result["rounds"]]
    assert len(admitted) == 5
    assert min(admitted) >= 2
    assert admitted[-1] == 3


def test_a_killed_cloud_goes_on_with_its_round_and_asks_nobody_twice(fleet, tmp_path):
    data = {name: {"delta": delta, "weight": weight, "seconds": seconds, "calls": tmp_path / f"{name}.calls"}
            for name, delta, weight, seconds in (("a", 1, 1, 0), ("b", 4, 2, 6))}  # fmt: skip
    for name, options in data.items():
        fleet.add_agent(name, **options)
    run = fleet.start_run("numbers", "rounds.clients=2", "rounds.quorum=2", rounds=2)
    fleet.agents["a"].wait_for("update.stored")  # a is acknowledged, b still trains
    fleet.cloud.kill()
    fleet.start_cloud()
    result, model = fleet.finish_run(run)
    mean = (1 * 1 + 2 * 4) / 3
    np.testing.assert_allclose(model["w"], np.full(3, 2 * mean), rtol=1e-6)
    assert [entry["admitted"] for entry in result["rounds"]] == [2, 2]
    assert calls(tmp_path / "a.calls") == 2
    assert calls(tmp_path / "b.calls") == 2


@pytest.mark.parametrize("fleet", ["mosquitto", "external"], indirect=True)
def test_agents_are_back_after_a_broker_restart(fleet, tmp_path):
    agents = [fleet.add_agent(name, delta=1, weight=1, calls=tmp_path / f"{name}.calls") for name in ("a", "b")]
    lines = [agent.num_lines() for agent in agents]
    fleet.kill_broker()
    if fleet.broker is not None:
        fleet.start_broker()
    for agent, after in zip(agents, lines, strict=True):
        agent.wait_for("mqtt.up", after=after)
    result, _ = fleet.run_task("numbers", "rounds.clients=2", "rounds.quorum=2")
    assert result["rounds"][0]["admitted"] == 2


def test_a_quorum_that_is_not_met_fails_the_run_with_every_reason(embedded_fleet, tmp_path):
    embedded_fleet.add_agent("a", delta="not-a-number", weight=1, calls=tmp_path / "a.calls")
    with pytest.raises(Exception, match=r"quorum is 1.*a: .*not-a-number"):
        embedded_fleet.run_task("numbers")


@pytest.mark.parametrize("plane", ["grpc", "http", "mqtt"])
def test_a_port_in_use_is_named(embedded_fleet, tmp_path, plane):
    second = LocalFleet(tmp_path / "second")
    port = getattr(embedded_fleet, f"{plane}_port")
    setattr(second, f"{plane}_port", port)
    with second, pytest.raises(Exception, match=rf"error: .*cannot listen on 127.0.0.1:{port}.*--{plane}-port"):
        second.start()


def test_an_agent_may_be_started_by_a_relative_home(embedded_fleet, tmp_path, monkeypatch):
    embedded_fleet.enroll("a")
    monkeypatch.chdir(embedded_fleet.folder)
    options = [part for key, value in {"delta": 2, "weight": 1, "calls": tmp_path / "a.calls"}.items()
               for part in ("--data", f"{key}={value}")]  # fmt: skip
    agent = embedded_fleet.spawn("a.log", "agent", "start", "--home", "a", "--serve-port", "0", *options)
    embedded_fleet.agents["a"] = agent
    agent.wait_for("mqtt.up")
    result, _ = embedded_fleet.run_task("numbers", "rounds.clients=1")
    assert result["rounds"][0]["admitted"] == 1
