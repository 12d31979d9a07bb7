"""`edgefl run`, as it is typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.errors import CloudRefused, ConfigError, JobFailed


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
    lines = done.stdout.splitlines()
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
        (["--set", "aggregation.rule=none"], CloudRefused, "none"),
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
