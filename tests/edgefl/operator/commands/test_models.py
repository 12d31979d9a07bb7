"""`edgefl models` and `edgefl rollout`, as they are typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.errors import CloudRefused, ConfigError, NotFound
from edgefl.protocols.messages import RolloutNote


@pytest.fixture
def edgefl(http_plane):
    def invoke(*arguments):
        return CliRunner(mix_stderr=False).invoke(
            cli, [str(one) for one in arguments], env={"EDGEFL_CREDENTIALS": str(http_plane.credentials)}
        )

    return invoke


@pytest.fixture
def fleet(http_plane):
    """Two devices, and a model of two versions."""
    http_plane.enroll("a", site="north")
    http_plane.enroll("b", site="south")
    for content in (b"v1", b"v2"):
        http_plane.registry.publish("m", http_plane.blobs.put(content), {"accuracy": 0.9})
    return http_plane


def answer(plane, **states):
    """Let the devices report these states as soon as they are told what to serve."""

    def send(device, signed):
        wish = json.loads(signed.text)
        state = states[device]
        plane.rollouts.note(device, RolloutNote(model="m", version=wish["release"]["version"], state=state, detail="!"))

    plane.rollouts._send = send


def test_a_job_becomes_a_release(edgefl, trainers, torch_task, tmp_path):
    out = tmp_path / "m.safetensors"
    ran = edgefl("run", torch_task, "--rounds", 1, "--out", out, "--json", "-")
    job = json.loads(ran.stdout)["job"]
    done = edgefl("models", "publish", "signs", "--task", torch_task, "--job", job, "--max-drop", 0.2)
    assert done.exit_code == 0, done.exception
    first, second, third = done.stdout.splitlines()
    assert first.startswith("signs version 1: accuracy=")
    assert second.startswith("int8: ")
    assert "(drop " in second
    assert third == "bring it to the devices: edgefl rollout start signs --version 1"
    arguments = ["models", "publish", "signs", "--task", torch_task, "--parameters", out, "--compress", "none"]
    release = json.loads(edgefl(*arguments, "--json", "-").stdout)
    assert (release["version"], release["compression"]) == (2, None)
    listed = edgefl("models", "list").stdout.splitlines()
    assert [line.split("\t")[:2] for line in listed] == [["model", "version"], ["signs", "2"], ["signs", "1"]]
    assert edgefl("models", "show", "signs").stdout.splitlines() == listed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--task", "t:t"],
        ["--onnx", "x", "--task", "t:t"],
        ["--parameters", "x"],
        ["--task", "t:t", "--job", "j", "--parameters", "x"],
    ],
)
def test_one_source_is_named(edgefl, arguments):
    done = edgefl("models", "publish", "m", *arguments)
    assert isinstance(done.exception, ConfigError)
    assert "name one source" in str(done.exception)


def test_nothing_published_yet(edgefl):
    assert "no model yet" in edgefl("models", "list").stdout
    assert isinstance(edgefl("models", "show", "m").exception, NotFound)


def test_a_rollout_waits_until_all_are_active(edgefl, fleet):
    answer(fleet, a="active", b="active")
    done = edgefl("rollout", "start", "m", "--wait", 10)
    assert done.exit_code == 0, (done.stdout, done.exception)
    assert "m version 2 to 2 devices" in done.stdout
    assert done.stdout.count("done: 2 of 2 devices active") == 1


def test_a_rollout_with_a_failure_exits_with_1_and_shows_whose(edgefl, fleet):
    answer(fleet, a="active", b="failed")
    done = edgefl("rollout", "start", "m", "--wait", 10, "--json", "-")
    assert done.exit_code == 1
    assert "b\tfailed\t!" in done.stderr
    assert json.loads(done.stdout)["state"] == "failed"


def test_a_rollout_that_is_not_over_in_time_exits_with_1(edgefl, fleet):
    answer(fleet, a="active", b="downloading")
    done = edgefl("rollout", "start", "m", "--wait", 0.2)
    assert done.exit_code == 1
    assert "running: 1 of 2 devices active" in done.stdout


def test_without_wait_it_only_starts(edgefl, fleet):
    done = edgefl("rollout", "start", "m", "--version", 1, "--to", "site=north", "--to", "name:b")
    assert done.exit_code == 0
    assert "m version 1 to 2 devices" in done.stdout
    assert "edgefl rollout status rollout-" in done.stdout


def test_going_back_needs_to_be_said(edgefl, fleet):
    edgefl("rollout", "start", "m")
    done = edgefl("rollout", "start", "m", "--version", 1)
    assert (done.exit_code, type(done.exception)) == (1, CloudRefused)
    assert "--rollback" in str(done.exception)
    assert edgefl("rollout", "start", "m", "--version", 1, "--rollback").exit_code == 0


def test_status_of_one_and_of_all(edgefl, fleet):
    assert edgefl("rollout", "status").stdout == "no rollout yet; `edgefl rollout start` makes one\n"
    rollout = json.loads(edgefl("rollout", "start", "m", "--json", "-").stdout)["id"]
    assert edgefl("rollout", "status", rollout).stdout.splitlines() == [
        f"{rollout}: m version 2, running", "device\tstate\tdetail", "a\tpending\t-", "b\tpending\t-",
    ]  # fmt: skip
    assert edgefl("rollout", "status").stdout.splitlines()[1].startswith(f"{rollout}\tm\t2\trunning\t2\t")
