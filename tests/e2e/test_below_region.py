"""What an operator does with devices reaches those below regions: lists, logs, choice, evaluation, rollouts."""

from __future__ import annotations

import json
import time

import pytest

from edgefl.errors import ProcessFailed
from tests.e2e.test_federated_evaluation import task_folder
from tests.onnx_models import affine

PARTS = {"a": 0, "b": 1}  # below r2, which is below r1; and at the cloud


@pytest.fixture
def fleet(builtin_fleet):
    fleet = builtin_fleet
    fleet.start_region("r1")
    fleet.start_region("r2", parent="r1")
    for name, region in (("a", "r2"), ("b", "")):
        fleet.enroll(name, "--tag", f"site={name}", region=region)
        fleet.restart_agent(name, part=PARTS[name], parts=2)
    return fleet


def listed(fleet):
    return {one["name"]: one for one in json.loads(fleet.command("devices", "list", "--json", "-"))}


def until(predicate):
    end_s = time.monotonic() + 60
    while not predicate():
        assert time.monotonic() < end_s
        time.sleep(0.2)


def test_every_command_for_a_device_reaches_one_below_a_region(fleet, tmp_path):
    until(lambda: all(one["telemetry"] is not None for one in listed(fleet).values()))
    a = listed(fleet)["a"]
    assert (a["online"], a["via"], a["tags"]) == (True, "r1", {"site": "a"})
    assert a["telemetry"].keys() == listed(fleet)["b"]["telemetry"].keys()
    assert json.loads(fleet.command("devices", "logs", "a", "--json", "-"))["lines"]

    out = tmp_path / "result.json"
    fleet.command(
        "run", task_folder(tmp_path), "--cloud", fleet.url, "--rounds", 2, "--json", out, "--set", "rounds.quorum=1",
        "--set", "rounds.select=tag.site == 'a' and mem_mb > 0 and failures == 0", timeout_s=400,
    )  # fmt: skip
    said = json.loads(out.read_text())
    assert [one["admitted"] for one in said["rounds"]] == [1, 1]
    assert [one["metrics"]["devices/gain"] for one in said["rounds"]] == [0.0, 1.0]  # w is 0, then 1; part 0
    assert said["final"]["devices/gain"] == 2.0
    shown = json.loads(fleet.command("jobs", "show", said["job"], "--tree", "--devices", "--json", "-"))
    r1 = next(one for one in shown["tree"]["children"] if one["name"] == "r1")
    r2 = next(one for one in r1["children"] if one["name"] == "r2")
    assert r2["children"][0]["job"] == {"admitted": 2, "failed": 0}
    for region in (r1, r2):
        assert (region["job"]["rounds"], region["job"]["admitted"]) == (2, 2)
        assert region["job"]["seconds"] > 0 < region["job"]["up_bytes"]
    assert {one["device"]: one["code"] for one in shown["devices"]} == {"a": "chosen", "b": "select"}

    model = tmp_path / "model.onnx"
    model.write_bytes(affine())
    fleet.command("models", "publish", "m", "--onnx", model, timeout_s=200)
    fleet.command("rollout", "start", "m", "--to", "name:a", "--wait", 120, timeout_s=200)
    until(lambda: listed(fleet)["a"]["models"] == {"m": 1})
    assert listed(fleet)["b"]["models"] == {}

    with pytest.raises(ProcessFailed, match="'r1' cannot be removed: the regions r2 are below it"):
        fleet.command("devices", "remove", "r1")
    with pytest.raises(ProcessFailed, match="'r2' cannot be removed: it is the only parent of a"):
        fleet.command("devices", "remove", "r2")
    seen = fleet.agents["a"].num_lines()
    fleet.command("devices", "remove", "a")
    fleet.agents["a"].wait_for("not enrolled, or not with this certificate", after=seen)
    assert listed(fleet).keys() == {"b"}
