"""`edgefl models` and `edgefl rollout`, as they are typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.config import JobConfig, RoundsConfig
from edgefl.errors import CloudRefused, ConfigError, NotFound, SignatureChanged
from edgefl.models.export import export_task
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.run import submit
from edgefl.protocols.messages import RolloutNote
from edgefl.records import RoundOutcome
from edgefl.task import load_task
from edgefl.training.evaluation import evaluate
from edgefl.trees import SpooledTree
from tests import onnx_models


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


def test_a_job_becomes_a_release(edgefl, trainers, wide_task, tmp_path):
    out = tmp_path / "m.safetensors"
    ran = edgefl("run", wide_task, "--rounds", 1, "--out", out, "--json", "-")
    job = json.loads(ran.stdout)["job"]
    done = edgefl("models", "publish", "signs", "--task", wide_task, "--job", job, "--max-drop", 0.2)
    assert done.exit_code == 0, done.exception
    first, second, third = done.stdout.splitlines()
    assert first.startswith("signs version 1: accuracy=")
    assert second.startswith("int8: ")
    assert "(drop " in second
    assert third == "deliver it to the devices: edgefl rollout start signs --version 1"
    arguments = ["models", "publish", "signs", "--task", wide_task, "--parameters", out, "--compress", "none"]
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
        ["--onnx", "x", "--task", "t:t", "--job", "j"],
        ["--parameters", "x"],
        ["--task", "t:t", "--job", "j", "--parameters", "x"],
    ],
)
def test_one_source_is_named(edgefl, arguments):
    done = edgefl("models", "publish", "m", *arguments)
    assert isinstance(done.exception, ConfigError)
    assert "name one source" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--onnx", "M", "--gate", "r2"], "--gate would do nothing here: without --task there are no data"),
        (["--onnx", "M", "--compress", "int8", "--max-drop", "0.1"], "--max-drop, --compress would do nothing here"),
        (["--task", "t:t", "--parameters", "M", "--sample", "M"], "--sample would do nothing here: a task's own data"),
        (["--task", "t:t", "--parameters", "M", "--compress", "none", "--gate", "r2"], "without compression nothing"),
        (
            ["--onnx", "M", "--task", "t:t", "--max-drop", "0.1"],
            "--max-drop would do nothing here: without compression",
        ),
        (["--onnx", "M", "--task", "t:t", "--metrics", "r2=1"], "--metrics would do nothing here: without compression"),
        (["--onnx", "M", "--metrics", "r2"], "--metrics 'r2' is not NAME=NUMBER"),
        (["--onnx", "M", "--sample", "none.npz"], "none.npz: there is no such file"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(edgefl, tmp_path, arguments, said):
    (tmp_path / "m").touch()
    done = edgefl("models", "publish", "m", *(str(tmp_path / "m") if one == "M" else one for one in arguments))
    assert (done.exit_code, type(done.exception)) == (1, ConfigError)
    assert said in str(done.exception)


def test_a_file_is_published_and_its_signature_shown(edgefl, tmp_path):
    for features in (3, 4):
        (tmp_path / f"{features}.onnx").write_bytes(onnx_models.affine(features=features))
    done = edgefl("models", "publish", "m", "--onnx", tmp_path / "3.onnx", "--compress", "none", "--metrics", "r2=0.5")
    assert done.stdout.splitlines() == [
        "m version 1: r2=0.5", "deliver it to the devices: edgefl rollout start m --version 1",
    ]  # fmt: skip
    other = ["models", "publish", "m", "--onnx", tmp_path / "4.onnx"]
    assert type(edgefl(*other).exception) is SignatureChanged
    assert edgefl(*other, "--new-signature").exit_code == 0
    listed = [line.split("\t")[-1] for line in edgefl("models", "show", "m").stdout.splitlines()]
    assert listed == ["signature", "x FP32[-1,4] -> y FP32[-1,4]", "x FP32[-1,3] -> y FP32[-1,3]"]


def test_a_task_measures_a_file_that_is_compressed_only_if_that_is_asked_for(edgefl, trainers, wide_task, tmp_path):
    out = tmp_path / "m.safetensors"
    edgefl("run", wide_task, "--rounds", 1, "--out", out)
    task = load_task(str(wide_task))
    export_task(task, SpooledTree(out), tmp_path / "m.onnx")
    publish = ["models", "publish", "m", "--onnx", tmp_path / "m.onnx", "--task", wide_task, "--json", "-"]
    release = json.loads(edgefl(*publish).stdout)
    assert release["compression"] is None
    assert release["metrics"] == pytest.approx(evaluate(task, SpooledTree(out)), abs=1e-5)
    release = json.loads(edgefl(*publish, "--compress", "int8", "--max-drop", 0.5).stdout)
    assert (release["version"], release["compression"]["measure"]) == (2, "accuracy")
    assert release["metrics"].keys() >= {"accuracy", "before/accuracy"}
    assert sorted(path.name for path in tmp_path.glob("*.onnx")) == ["m.onnx"]  # nothing is written beside it


def submitted(plane, task, rounds_done, **end):
    """A job of so many finished rounds of 5, which ended so, if it did."""
    plane.jobs.started = lambda _job: None
    with CloudClient(None, load_credentials(plane.credentials)) as client:
        job = submit(client, str(task), load_task(str(task)), JobConfig(rounds=RoundsConfig(count=5)))
    row = plane.jobs.load(job)
    for number in range(1, rounds_done + 1):
        plane.jobs.open_round(job, number, ["a"])
        outcome = RoundOutcome(
            job=job, round=number, parameters={}, admitted=("a",), rejected={}, failed={}, missing=(), weight=1.0,
            metrics={}, seconds=0.1, up_bytes=0, down_bytes=0,
        )  # fmt: skip
        plane.jobs.finish_round(outcome, row.model, None)
    if end:
        plane.jobs.end(job, **end)
    return job


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ({"state": "failed", "error": "no quorum"},
         "failed before its first round was finished (no quorum), so its parameters are untrained and nothing is"),
        ({"state": "cancelled"}, "was cancelled before its first round was finished, so its parameters are untrained"),
        ({}, "has not finished a round yet, so its parameters are untrained. Wait for it: edgefl jobs watch job-"),
    ],
)  # fmt: skip
def test_parameters_that_no_round_trained_are_not_published(edgefl, http_plane, torch_task, end, said):
    job = submitted(http_plane, torch_task, 0, **end)
    done = edgefl("models", "publish", "signs", "--task", torch_task, "--job", job)
    assert (done.exit_code, type(done.exception)) == (1, ConfigError)
    assert said in str(done.exception)
    assert http_plane.registry.list() == []


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ({"state": "failed", "error": "no quorum"}, "failed after 2 of 5 rounds (no quorum)"),
        ({"state": "cancelled"}, "was cancelled after 2 of 5 rounds"),
        ({}, "is still running, after 2 of 5 rounds"),
    ],
)
def test_a_job_that_is_not_done_is_published_as_far_as_it_came_and_that_is_said(
    edgefl, http_plane, torch_task, end, said
):
    job = submitted(http_plane, torch_task, 2, **end)
    done = edgefl("models", "publish", "signs", "--task", torch_task, "--job", job, "--compress", "none")
    assert done.exit_code == 0, done.exception
    assert done.stdout.splitlines()[0] == f"note: job {job} {said}; this is its model after round 2"
    assert [one["version"] for one in http_plane.registry.list()] == [1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["My Model"], "cannot be a model's name"),
        (["m", "--max-drop", "2"], "--max-drop 2 must be in 0..1"),
        (["m", "--parameters", "none.safetensors"], "none.safetensors: there is no such file"),
    ],
)
def test_arguments_are_refused_before_the_task_is_even_loaded(edgefl, tmp_path, arguments, said):
    source = [] if "--parameters" in arguments else ["--job", "job-0"]
    done = edgefl("models", "publish", *arguments, "--task", tmp_path / "no task", *source)
    assert (done.exit_code, type(done.exception)) == (1, ConfigError)
    assert said in str(done.exception)


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
    assert edgefl("rollout", "status").stdout == "no rollout yet; `edgefl rollout start` starts one\n"
    rollout = json.loads(edgefl("rollout", "start", "m", "--json", "-").stdout)["id"]
    assert edgefl("rollout", "status", rollout).stdout.splitlines() == [
        f"{rollout}: m version 2, running", "device\tstate\tdetail", "a\tpending\t-", "b\tpending\t-",
    ]  # fmt: skip
    assert edgefl("rollout", "status").stdout.splitlines()[1].startswith(f"{rollout}\tm\t2\trunning\t2\t")
