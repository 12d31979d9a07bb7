"""`edgefl run`, as it is typed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.errors import ConfigError, JobFailed
from edgefl.operator.client import CloudClient
from tests.edgefl.conftest import write_task


@pytest.fixture
def edgefl(http_plane):
    def invoke(*arguments):
        return CliRunner(mix_stderr=False).invoke(
            cli, [str(one) for one in arguments], env={"EDGEFL_CREDENTIALS": str(http_plane.credentials)}
        )

    return invoke


def test_a_run_prints_its_rounds_and_leaves_model_and_json(edgefl, trainers, torch_task, tmp_path):
    out, result = tmp_path / "m.safetensors", tmp_path / "r.json"
    done = edgefl("run", torch_task, "--rounds", 2, "--set", "train.lr=0.5", "--out", out, "--json", result)
    assert done.exit_code == 0, (done.output, done.exception)
    lines = [line for line in done.stdout.splitlines() if line != "waiting for devices"]
    assert lines[0].startswith("job job-")
    assert lines[0].endswith("started: 2 rounds")
    assert lines[1].startswith("round 1/2: 2 admitted in ")
    assert "accuracy=" in lines[2]
    assert lines[-2] == f"model: {out}"
    assert lines[-1].startswith(f"publish it: edgefl models publish NAME --task {torch_task} --job job-")
    assert json.loads(result.read_text())["model"]["path"] == str(out)


def test_json_on_stdout_is_alone_there(edgefl, trainers, plain_task):
    done = edgefl("run", plain_task, "--rounds", 1, "--json", "-")
    assert json.loads(done.stdout)["final"] == {"train_loss": 0.5}
    assert "round 1/1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["--set", "rounds.cuont=2"], ConfigError, "unknown configuration key 'rounds.cuont'"),
        (["--config", "none.toml"], ConfigError, "cannot read the configuration none.toml"),
        (["--out", "/no/folder/x"], ConfigError, "--out"),
        (["--set", "aggregation.rule=none"], ConfigError, "none"),
        (["--set", "rounds.quorum=9"], JobFailed, "the quorum is 9"),
    ],
)
def test_what_cannot_run_fails_and_says_why(edgefl, trainers, plain_task, arguments, kind, said):
    done = edgefl("run", plain_task, *arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, kind)
    assert said in str(done.exception)


def test_a_job_outlives_ctrl_c(edgefl, trainers, plain_task, http_plane, monkeypatch):
    from edgefl.operator import run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "watch", interrupted)
    done = edgefl("run", plain_task, "--rounds", 1)
    assert done.exit_code == 130
    (job,) = http_plane.jobs.list()
    assert f"edgefl jobs watch {job['id']}" in done.stdout
    assert job["state"] != "cancelled"


def test_a_ctrl_c_while_the_job_is_submitted_says_that_it_may_run(
    edgefl, trainers, plain_task, http_plane, monkeypatch
):
    submit_job = CloudClient.submit_job

    def answered_too_late(*arguments, **options):
        submit_job(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(CloudClient, "submit_job", answered_too_late)
    done = edgefl("run", plain_task, "--rounds", 1)
    assert done.exit_code == 130
    assert "which may run in the cloud. Check with: edgefl jobs list" in done.stdout
    assert len(http_plane.jobs.list()) == 1


SPACE = "waiting for disk space in /srv/cloud: full"
SLOW_TASK = """
import threading
print("loading", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "TASK"], "interrupted before the job was submitted; nothing runs in the cloud"),
        (["jobs", "watch", "job-1", "--task", "TASK"], "no longer watching; job job-1 continues in the cloud, unless"),
    ],
)
def test_an_early_ctrl_c_ends_with_130_and_says_what_goes_on(tmp_path, arguments, said):
    folder = write_task(tmp_path / "slow", SLOW_TASK, "slow_task")
    command = [sys.executable, "-m", "edgefl", *(str(folder) if one == "TASK" else one for one in arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "loading\n"
            process.send_signal(signal.SIGINT)
            shown, complaint = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, complaint) == (130, "")
    assert said in shown


def test_a_run_says_once_that_its_job_waits_for_space_and_once_that_it_goes_on(
    edgefl, trainers, plain_task, http_plane
):
    trainers.gate.clear()  # which holds the job after its first round
    looks = []

    def waiting():
        looks.append(1)
        if len(looks) < 10:
            return SPACE
        trainers.gate.set()
        return ""

    http_plane.jobs.waiting = waiting
    done = edgefl("run", plain_task, "--rounds", 2)
    assert done.exit_code == 0, done.exception
    (job,) = (one["id"] for one in http_plane.jobs.list())
    lines = [line for line in done.stdout.splitlines() if "pauses" in line or "continues:" in line]
    assert lines == [
        f"job {job} pauses: the cloud is {SPACE}. It continues by itself afterwards",
        f"job {job} continues: the cloud no longer waits",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ["run"], ["devices", "list"], ["devices", "remove"], ["jobs", "list"], ["jobs", "show"], ["jobs", "cancel"],
        ["jobs", "watch"], ["models", "publish"], ["models", "list"], ["models", "show"], ["rollout", "start"],
        ["rollout", "status"], ["cloud", "start"], ["cloud", "token"], ["cloud", "broker-config"],
        ["agent", "enroll"], ["agent", "start"], ["agent", "status"], ["agent", "doctor"], ["agent", "install"],
        ["agent", "uninstall"],
    ],
)  # fmt: skip
def test_every_command_has_help_with_an_example(edgefl, command):
    done = edgefl(*command, "--help")
    assert done.exit_code == 0
    assert f"Example:\n    edgefl {' '.join(command)}" in done.stdout
