"""`edgefl devices` and `edgefl jobs`, as they are typed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.config import JobConfig
from edgefl.errors import NotFound
from edgefl.protocols.messages import DeviceState, Telemetry
from edgefl.terminal.output import time_text


@pytest.fixture
def edgefl(http_plane):
    def invoke(*arguments):
        return CliRunner(mix_stderr=False).invoke(
            cli, [str(one) for one in arguments], env={"EDGEFL_CREDENTIALS": str(http_plane.credentials)}
        )

    return invoke


@pytest.fixture
def job(edgefl, trainers, plain_task):
    return json.loads(edgefl("run", plain_task, "--rounds", 2, "--json", "-").stdout)["job"]


def test_devices_are_listed_and_removed(edgefl, http_plane):
    assert "no device is enrolled" in edgefl("devices", "list").stdout
    http_plane.enroll("a", "b", site="north")
    http_plane.link.states["a"] = DeviceState(session=1, online=True, agent_version="0", models={"m": 2})
    http_plane.link.measured["a"] = Telemetry(
        cpu_count=4, cpu_percent=12.5, load_1m=0.5, ram_total_mb=8e3, ram_available_mb=6.02e3, disk_free_mb=4e4
    )
    head, first, second = (line.split("\t") for line in edgefl("devices", "list").stdout.splitlines())
    assert head[:7] == ["name", "state", "models", "tags", "cpu", "free memory", "free disk"]
    assert first[4:7] == ["12% of 4", "6.0/8.0 GB", "40.0 GB"]
    assert second[4:7] == ["-", "-", "-"]
    assert first[:4] == ["a", "online", "m:2", "site=north"]
    assert second[:4] == ["b", "offline", "-", "site=north"]
    assert edgefl("devices", "remove", "a").stdout == "device a is removed from the fleet\n"
    assert [one["name"] for one in json.loads(edgefl("devices", "list", "--json", "-").stdout)] == ["b"]


def test_a_device_that_is_not_there(edgefl):
    done = edgefl("devices", "remove", "ghost")
    assert (done.exit_code, type(done.exception)) == (1, NotFound)


def test_jobs_are_listed_shown_and_watched(edgefl, job, plain_task, tmp_path):
    line = edgefl("jobs", "list").stdout.splitlines()[1].split("\t")
    assert line[:4] == [job, "plain_task:task", "done", "2/2"]
    shown = edgefl("jobs", "show", job).stdout.splitlines()
    assert shown[0] == f"{job} plain_task:task: done, 2/2 rounds"
    assert shown[1].startswith("round 1/2: 2 admitted")
    assert json.loads(edgefl("jobs", "show", job, "--json", "-").stdout)["state"] == "done"
    out = tmp_path / "m"
    watched = edgefl("jobs", "watch", job, "--task", plain_task, "--out", out, "--json", "-")
    assert json.loads(watched.stdout)["model"]["path"] == str(out)
    assert out.exists()


def test_a_failed_job_shows_its_error(edgefl, trainers, plain_task, http_plane):
    edgefl("run", plain_task, "--set", "rounds.quorum=9")
    (failed,) = http_plane.jobs.list()
    assert "error: round 1: 2 clients are available" in edgefl("jobs", "show", failed["id"]).stdout


def test_an_ended_job_is_not_cancelled_any_more(edgefl, job, http_plane):
    done = edgefl("jobs", "cancel", job)
    ended = time_text(http_plane.jobs.row(job)["ended_s"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert str(done.exception) == (
        f"job {job} has already ended, nothing is cancelled: it was done at {ended}, after 2/2 rounds"
    )


def test_a_failed_job_is_not_cancelled_and_says_why_it_failed(edgefl, trainers, plain_task, http_plane):
    edgefl("run", plain_task, "--set", "rounds.quorum=9")
    (failed,) = http_plane.jobs.list()
    done = edgefl("jobs", "cancel", failed["id"])
    assert done.exit_code == 1
    assert "nothing is cancelled: it failed at " in str(done.exception)
    assert "after 0/10 rounds (round 1: 2 clients are available" in str(done.exception)


def test_a_job_is_cancelled_once_and_a_second_time_is_no_error(edgefl, trainers, plain_task, http_plane):
    http_plane.jobs.started = lambda _job: None
    bundle, tree = http_plane.blobs.put(b"zip"), http_plane.blobs.put_tree({"w": np.zeros(2, np.float32)})
    job = http_plane.jobs.submit("t:t", bundle, tree, (), JobConfig())
    assert edgefl("jobs", "cancel", job).stdout == f"job {job} is cancelled\n"
    again = edgefl("jobs", "cancel", job)
    ended = time_text(http_plane.jobs.row(job)["ended_s"])
    said = f"job {job} has already ended: it was cancelled at {ended}, after 0/10 rounds\n"
    assert (again.exit_code, again.stdout) == (0, said)


@pytest.mark.parametrize("command", ["show", "cancel", "watch"])
def test_a_job_that_is_not_there(edgefl, command):
    done = edgefl("jobs", command, "job-0")
    assert (done.exit_code, type(done.exception)) == (1, NotFound)


def test_a_relay_is_shown_by_its_messages(edgefl, http_plane):
    relay = http_plane.relays.start("app:app", http_plane.blobs.put(b"zip"))
    listed = edgefl("jobs", "list").stdout.splitlines()[1].split("\t")
    assert listed[:4] == [relay, "app:app", "running", "0/0 messages"]
    assert edgefl("jobs", "show", relay).stdout.splitlines() == [f"{relay} app:app: running, 0/0 messages"]
    assert "its rounds are shown by its `edgefl run`" in str(edgefl("jobs", "watch", relay).exception)
    assert edgefl("jobs", "cancel", relay).stdout == f"job {relay} is cancelled\n"
