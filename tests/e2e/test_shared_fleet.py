"""Jobs that share one fleet of real processes: turns, priorities, pausing over kill -9, continuing, choice, policy."""

from __future__ import annotations

import datetime
import json

import numpy as np
import pytest

from edgefl.errors import ProcessFailed
from edgefl.trees import SpooledTree
from tests.e2e.conftest import TASKS

TWO = ("rounds.clients=2", "rounds.quorum=2")
MEAN = (1 * 1.0 + 2 * 4.0) / 3


@pytest.fixture
def pair(embedded_fleet, tmp_path):
    """A fleet of two devices whose rounds take a little."""
    for name, delta, weight in (("a", 1.0, 1), ("b", 4.0, 2)):
        embedded_fleet.add_agent(name, delta=delta, weight=weight, seconds=0.2, calls=tmp_path / f"{name}.calls")
    return embedded_fleet


def run_of(fleet, name, *settings, rounds):
    """Start `edgefl run` as a process of its own; return it and the file of its result."""
    result = fleet.folder / f"{name}.json"
    options = [part for setting in (*TWO, *settings) for part in ("--set", setting)]
    command = ("run", TASKS / "numbers", "--name", name, "--rounds", rounds, *options, "--json", result)
    process = fleet.spawn(f"{name}.log", *command, "--out", fleet.folder / f"{name}.safetensors")
    fleet.agents[f"run {name}"] = process  # ended with the fleet
    return process, result


def jobs_of(fleet):
    return {one["label"]: one for one in json.loads(fleet.command("jobs", "list", "--json", "-"))}


def model_of(fleet, name):
    return SpooledTree(fleet.folder / f"{name}.safetensors")["w"]


def test_two_jobs_take_turns_a_queue_is_seen_and_priority_goes_first(pair):
    slow, _ = run_of(pair, "slow", rounds=30)
    slow.wait_for("round 2/30")
    urgent, urgent_result = run_of(pair, "urgent", "rounds.priority=5", rounds=4)
    urgent.wait_for("round 1/4")
    waiting = jobs_of(pair)["slow"]["waiting"]
    assert waiting is None or "that work for job-" in waiting or "that works for job-" in waiting
    for process in (urgent, slow):
        process.wait_for("done in")
    first = jobs_of(pair)["urgent"]["id"]
    log = (pair.folder / "cloud.log").read_text().splitlines()
    order = [f"job={first} " in line for line in log if "round.done" in line]
    assert order[order.index(True) :][:4] == [True] * 4  # from its first to its last round, the other job waited
    for name, rounds in (("slow", 30), ("urgent", 4)):
        np.testing.assert_allclose(model_of(pair, name), rounds * MEAN, rtol=1e-6)
    told = json.loads(urgent_result.read_text())["rounds"]
    assert [one["admitted"] for one in told] == [2] * 4


def test_a_paused_job_survives_kill_9_and_continues_from_any_kept_round(pair):
    _, result = run_of(pair, "first", rounds=40)
    job = None
    while job is None:
        job = jobs_of(pair).get("first", {}).get("id")
    pair.cloud.wait_for("round.done")
    paused = json.loads(pair.command("jobs", "pause", "first", "--json", "-"))
    assert paused == {"id": job, "state": "paused"}
    pair.cloud.wait_for("job.paused")
    before = jobs_of(pair)["first"]
    assert 1 <= before["rounds_done"] < 40
    pair.cloud.kill()
    pair.start_cloud()
    after = jobs_of(pair)["first"]
    assert (after["state"], after["rounds_done"]) == ("paused", before["rounds_done"])
    assert after["waiting"] == f"waiting for `edgefl jobs resume {job}`"
    pair.command("jobs", "resume", "first")
    pair.cloud.wait_for("job.done")
    out = pair.folder / "on.safetensors"
    with pytest.raises(ProcessFailed, match=r"round 1 of job .* is not kept; kept are: \d"):
        pair.command("run", "--resume", "first", "--round", "1", "--rounds", "50")
    pair.command("run", TASKS / "numbers", "--resume", "first", "--round", "39", "--rounds", "42", "--name", "on",
                 "--json", pair.folder / "on.json", "--out", out)  # fmt: skip
    np.testing.assert_allclose(model_of(pair, "on"), 42 * MEAN, rtol=1e-6)
    assert [one["round"] for one in json.loads((pair.folder / "on.json").read_text())["rounds"]] == [40, 41, 42]
    assert jobs_of(pair)["on"]["continues"] == f"{job} round 39"
    pair.command("jobs", "watch", "first", "--json", result)
    assert len(json.loads(result.read_text())["rounds"]) == 40


def test_devices_are_chosen_by_tag_and_policy_and_a_job_stops_early(embedded_fleet, tmp_path):
    fleet = embedded_fleet
    now = datetime.datetime.now().astimezone()
    begin, end = ((now + datetime.timedelta(hours=hours)).strftime("%H:%M") for hours in (3, 4))
    for name, site, options in (
        ("a", "x", ()), ("b", "y", ()), ("c", "x", ("--policy", f"charging,{begin}-{end}")), ("d", "x", ()),
    ):  # fmt: skip
        fleet.enroll(name, "--tag", f"site={site}")
        data = {"delta": 1.0, "weight": 1, "calls": tmp_path / f"{name}.calls"}
        agent = fleet.start_agent(name, *(part for key, value in data.items() for part in ("--data", f"{key}={value}")),
                                  *options)  # fmt: skip
        agent.wait_for("mqtt.up")
    fleet.agents["d"].stop()
    settings = ("rounds.select=tag.site == 'x' and mem_mb > 1", "rounds.stop.metric=train_delta",
                "rounds.stop.direction=max", "rounds.stop.patience=2")  # fmt: skip
    result, model = fleet.run_task("numbers", *settings, rounds=30)
    assert [one["admitted"] for one in result["rounds"]] == [1, 1, 1]
    assert result["stopped"] == "train_delta has not improved since round 1 (1); it is round 3"
    assert model["w"].tolist() == [3.0] * 3
    shown = json.loads(fleet.command("jobs", "show", result["job"], "--devices", "--json", "-"))
    assert shown["stopped"] == result["stopped"]
    codes = {one["device"]: (one["code"], one["reason"]) for one in shown["devices"]}
    assert codes["a"] == ("chosen", "")
    assert codes["b"][0] == "select"
    assert "tag.site is 'y'" in codes["b"][1]
    assert codes["c"][0] == "policy"
    assert f"outside-hours (it is {now:%H}" in codes["c"][1] or "outside-hours" in codes["c"][1]
    assert codes["d"] == ("offline", "it is offline")
    status = json.loads(fleet.command("agent", "status", "--home", fleet.folder / "c", "--json", "-"))
    assert status["policy"] == f"charging,{begin}-{end}"
    assert "outside-hours" in status["policy_refuses"]


def test_what_cannot_be_chosen_is_refused_before_any_work(embedded_fleet):
    for setting, complaint in (
        ("rounds.select=open('x')", "is a call"), ("rounds.select=mem > 5", "there is no field 'mem'"),
        ("rounds.select=mem_mb > 'a'", "compares two of a kind"),
        ("rounds.select=" + " or ".join(["on_mains"] * 150), "more than 100 terms"),
    ):  # fmt: skip
        with pytest.raises(ProcessFailed, match=complaint):
            embedded_fleet.run_task("numbers", setting)
    assert json.loads(embedded_fleet.command("jobs", "list", "--json", "-")) == []
    embedded_fleet.enroll("never")
    with pytest.raises(ProcessFailed, match=r"never true: no minute of a day is in all of 08:00-09:00,10:00-11:00"):
        embedded_fleet.command(
            "agent", "start", "--home", embedded_fleet.folder / "never", "--policy", "08:00-09:00,10:00-11:00"
        )
