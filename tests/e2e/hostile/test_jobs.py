"""Jobs that cannot go well: told with their reason, by a command that fails; the next round is right."""

import json
import os
import shutil
import signal
import sqlite3

import httpx
import numpy as np
import pytest

from edgefl.errors import ProcessFailed
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.protocols.tls import client_context
from edgefl.trees import SpooledTree

COUNTER = """
import numpy as np
from edgefl import FitResult, Task

def fit(parameters, config, options):
    return FitResult(tree={"n": np.array(1, np.int64)}, weight=1.0, metrics={})

task = Task(name="counter", initial=lambda: {"n": np.array(2**63 - 3, np.int64)}, fit=fit)
"""


def jobs(fleet):
    return json.loads(fleet.command("jobs", "list", "--json", "-"))


def test_a_setting_that_later_layers_cannot_hold_is_refused_by_name(embedded_fleet, three, round_is_right, tmp_path):
    three(embedded_fleet)
    for setting, said in (
        ("train.seed=-1", "train.seed=-1 must be 0 or more"),
        ("rounds.deadline_s=1e12", "rounds.deadline_s=1000000000000.0 must be above 0"),
        ("rounds.wait_s=1e300", "rounds.wait_s="),
        ("train.lr=1e39", r"train.lr=1e\+39"),
        ("rounds.clients=99999999999999999999", "rounds.clients="),
    ):
        with pytest.raises(ProcessFailed, match=said):
            embedded_fleet.run_task("numbers", setting)
    config = tmp_path / "job.toml"
    config.write_text("[train]\nseed = -1\n")
    with pytest.raises(ProcessFailed, match=r"train\.seed=-1 must be 0 or more"):
        embedded_fleet.run_task("numbers", config=config)
    assert jobs(embedded_fleet) == []
    round_is_right(embedded_fleet)


def test_the_https_plane_refuses_the_same_and_goes_on(fleet, three, round_is_right):
    three(fleet)
    credentials = load_credentials(fleet.credentials)
    fleet.run_task("numbers", "rounds.clients=3")
    with CloudClient(None, credentials) as client:
        model = client.jobs()[0]["model"]
    bodies = [
        {"train": {"seed": -1}}, {"train": {"seed": 10**30}}, {"rounds": {"deadline_s": 1e12}},
        {"rounds": {"count": True}}, {"server": {"options": {"momentum": {"a": []}}}}, {"rounds": []},
    ]  # fmt: skip
    with httpx.Client(
        base_url=fleet.url, verify=client_context(fleet.home / "tls" / "ca.pem"), trust_env=False,
        headers={"Authorization": f"Bearer {credentials.token}"},
    ) as http:  # fmt: skip
        for config in bodies:
            body = {"task": "t:t", "bundle": model, "parameters": model, "config": config}
            answer = http.post("/v1/jobs", json=body)
            assert answer.status_code == 400, answer.text
            assert next(iter(config)) in answer.json()["error"]
    assert len(jobs(fleet)) == 1
    round_is_right(fleet)


def test_sums_beyond_float32_and_a_counter_that_wraps_fail_the_run_and_keep_what_was(fleet, three, tmp_path,
                                                                                     round_is_right):  # fmt: skip
    fleet.add_agent("x", delta=3e38, weight=1, calls=tmp_path / "x.calls")
    with pytest.raises(ProcessFailed, match=r"round 2 .*'w' holds NaN or infinity"):
        fleet.run_task("numbers", rounds=5)
    assert kept(fleet)["w"][0] == np.float32(3e38)  # of round 1
    task = tmp_path / "counter"
    task.mkdir()
    (task / "counter_task.py").write_text(COUNTER)
    (task / "pyproject.toml").write_text('[tool.edgefl]\ntask = "counter_task:task"\n')
    with pytest.raises(ProcessFailed, match=r"round 3 .*'n' is beyond the range of int64"):
        fleet.run_task(task, rounds=5)
    assert kept(fleet)["n"] == 2**63 - 1
    fleet.agents.pop("x").stop()
    three(fleet)
    round_is_right(fleet)


def kept(fleet):
    """Return the parameters that the last job stands on."""
    job = jobs(fleet)[0]
    assert job["state"] == "failed"
    return SpooledTree(fleet.home / "blobs" / job["model"]["sha256"])


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_model_that_the_disk_has_changed_fails_its_job_when_the_cloud_is_back(fleet, three, tmp_path, round_is_right):
    fleet.add_agent("x", delta=1, weight=1, seconds=60, calls=tmp_path / "x.calls")
    run = fleet.start_run("numbers", "rounds.clients=1", rounds=3)
    fleet.agents["x"].wait_for("plan.taken")
    fleet.cloud.kill()
    model = fleet.home / "blobs" / open_model(fleet)
    flip(model, model.stat().st_size - 1)
    fleet.start_cloud()
    run.popen.wait(60)
    assert run.stop() != 0
    assert "does not have the hash in its name" in run.log.read_text()
    assert jobs(fleet)[0]["state"] == "failed"
    fleet.agents.pop("x").stop()
    three(fleet)
    round_is_right(fleet)


def open_model(fleet):
    copy = fleet.folder / "copy.db"
    for suffix in ("", "-wal"):
        shutil.copy(f"{fleet.home / 'cloud.db'}{suffix}", f"{copy}{suffix}")
    db = sqlite3.connect(copy)
    (sha256,) = db.execute("SELECT model_sha256 FROM jobs WHERE state = 'running'").fetchone()
    db.close()
    return sha256


def test_a_model_that_changes_under_an_open_round_fails_it(fleet, three, tmp_path, round_is_right):
    fleet.add_agent("x", delta=1, weight=1, seconds=3, calls=tmp_path / "x.calls")
    run = fleet.start_run("numbers", "rounds.clients=1", rounds=3)
    fleet.agents["x"].wait_for("trainer.started")
    model = fleet.home / "blobs" / open_model(fleet)
    while not (tmp_path / "x.calls").exists():
        assert run.popen.poll() is None
    flip(model, model.stat().st_size - 1)
    run.popen.wait(60)
    assert run.stop() != 0
    assert "does not have the hash in its name" in run.log.read_text()
    fleet.agents.pop("x").stop()
    three(fleet)
    round_is_right(fleet)


def test_a_trainer_that_is_killed_costs_no_update_where_the_quorum_is_all(fleet, three, tmp_path, round_is_right):
    fleet.add_agent("x", delta=3, weight=1, seconds=2, calls=tmp_path / "x.calls")
    fleet.add_agent("y", delta=5, weight=1, calls=tmp_path / "y.calls")
    run = fleet.start_run("numbers", "rounds.clients=2", "rounds.quorum=2", "rounds.deadline_s=60")
    calls = tmp_path / "x.calls"
    while not calls.exists() or "fit" not in calls.read_text():
        assert run.popen.poll() is None
    started = next(line for line in fleet.agents["x"].log.read_text().splitlines() if "trainer.started" in line)
    os.kill(int(started.rpartition("pid=")[2]), signal.SIGKILL)
    result, model = fleet.finish_run(run)
    fleet.agents["x"].wait_for("trainer.lost")
    assert [one["admitted"] for one in result["rounds"]] == [2]
    np.testing.assert_allclose(model["w"], np.full(3, 4.0), rtol=1e-6)
    assert (tmp_path / "x.calls").read_text().count("fit") == 2
    for name in ("x", "y"):
        fleet.agents.pop(name).stop()
    three(fleet)
    round_is_right(fleet)
