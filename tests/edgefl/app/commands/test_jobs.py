"""`edgefl jobs`, as it is typed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.config import JobConfig, RoundsConfig
from edgefl.errors import NotFound
from edgefl.operator.client import CloudClient, Patience, load_credentials
from edgefl.operator.run import submit
from edgefl.task import load_task
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


def test_jobs_are_listed_shown_and_watched(edgefl, job, plain_task, tmp_path):
    line = edgefl("jobs", "list").stdout.splitlines()[1].split("\t")
    assert line[:6] == [job, "-", "plain_task:task", "done", "2/2", "train_loss=0.5"]
    shown = edgefl("jobs", "show", job).stdout.splitlines()
    assert shown[0] == f"{job} plain_task:task: done, 2/2 rounds"
    assert shown[2] == "settings: rounds.count=2, others as by default"
    assert shown[3].startswith("rounds 1 to 2: 4 admitted; ")
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
    assert listed[:5] == [relay, "-", "app:app", "running", "0/0 messages"]
    assert edgefl("jobs", "show", relay).stdout.splitlines()[0] == f"{relay} app:app: running, 0/0 messages"
    assert "its rounds are shown by its `edgefl run`" in str(edgefl("jobs", "watch", relay).exception)
    assert edgefl("jobs", "cancel", relay).stdout == f"job {relay} is cancelled\n"


@pytest.fixture
def named(edgefl, trainers, torch_task):
    """Two jobs of one task with test data: `slow`, then `fast` with another learning rate."""
    for name, rate in (("slow", 0.001), ("fast", 0.5)):
        done = edgefl("run", torch_task, "--name", name, "--rounds", 3, "--set", f"train.lr={rate}")
        assert done.exit_code == 0, done.stderr
    return {name: json.loads(edgefl("jobs", "show", name, "--json", "-").stdout) for name in ("slow", "fast")}


def test_a_job_is_called_by_its_name_and_shows_the_curve_of_each_metric(edgefl, named):
    job = named["fast"]
    assert (job["label"], job["curves"].keys()) == ("fast", {"accuracy", "loss", "train_loss"})
    evaluated = [one["metrics"]["accuracy"] for one in job["rounds"]]
    assert job["curves"]["accuracy"]["values"] == evaluated
    assert job["curves"]["accuracy"]["highest"] == max(evaluated)
    rows = [line.split("\t") for line in edgefl("jobs", "show", job["id"][:12]).stdout.splitlines() if "\t" in line]
    assert [row[0] for row in rows] == ["metric", "accuracy", "loss", "train_loss"]
    assert rows[1][1:3] == [f"{evaluated[0]:.4g}", f"{evaluated[-1]:.4g}"]
    assert [len(row[-1]) for row in rows[1:]] == [3, 3, 3]  # a mark per round
    listed = {line.split("\t")[1]: line.split("\t") for line in edgefl("jobs", "list").stdout.splitlines()}
    assert listed["fast"][5] == f"accuracy={evaluated[-1]:.4g}"


def test_jobs_are_compared_by_what_differs(edgefl, named):
    lines = edgefl("jobs", "compare", "slow", "fast").stdout.splitlines()
    assert lines[0] == f"A: {named['slow']['id']} 'slow'"
    assert [line for line in lines if "train.lr" in line] == ["train.lr\t0.001\t0.5"]
    assert not [line for line in lines if "rounds.count" in line]
    result = json.loads(edgefl("jobs", "compare", "slow", "fast", "--json", "-").stdout)
    assert result["settings"] == {"train.lr": [0.001, 0.5]}
    assert [one["last"] for one in result["metrics"]["loss"]] == [
        named[name]["curves"]["loss"]["last"] for name in ("slow", "fast")
    ]
    twice = edgefl("jobs", "compare", "slow", named["slow"]["id"])
    assert "a job is named twice" in str(twice.exception)


def test_the_rounds_of_jobs_are_drawn(edgefl, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "both.png"
    assert edgefl("jobs", "plot", "slow", "fast", "-o", out).stdout == f"plot: {out}\n"
    assert out.read_bytes()[:4] == b"\x89PNG"
    name = f"{named['slow']['id']}.png"
    assert json.loads(edgefl("jobs", "plot", "slow", "--json", "-").stdout) == {
        "jobs": [named["slow"]["id"]], "plot": name,
    }  # fmt: skip
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("out", ["x.xyz", "none/x.png"])
def test_a_file_that_cannot_be_drawn_is_refused_before_the_cloud_is_asked(tmp_path, out):
    done = CliRunner().invoke(cli, ["jobs", "plot", "j", "-o", str(tmp_path / out), "--credentials", "none"])
    assert str(done.exception).startswith("--out ")


def test_a_job_without_rounds_is_not_drawn(edgefl, trainers, plain_task, http_plane):
    edgefl("run", plain_task, "--set", "rounds.quorum=9", "--name", "failed")
    assert "has no rounds to draw: round 1: 2 clients are available" in str(edgefl("jobs", "plot", "failed").exception)


def test_a_name_that_is_none_is_refused_before_the_task_is_loaded(edgefl):
    assert "--name 'job-1'" in str(edgefl("run", "no/such/task", "--name", "job-1").exception)


def test_no_id_is_cut_on_a_terminal(on_terminal, named):
    ids = [job["id"] for job in named.values()]
    shown = on_terminal("jobs", "list")
    assert all(one in shown for one in ids)
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines()), shown
    assert " ago" in shown
    narrow = on_terminal("jobs", "list", columns=30)
    assert all(one in narrow for one in ids)
    page = on_terminal("jobs", "show", "fast")
    assert all(len(line.rstrip()) <= 80 for line in page.splitlines()), page


def test_the_clouds_log_of_a_job_and_a_devices(edgefl, job, http_plane):
    (http_plane.folder / "cloud.log").write_text(f"one job={job}\n    trace\ntwo job=other\nthree job={job}\n")
    assert edgefl("jobs", "logs", job).stdout == f"one job={job}\n    trace\nthree job={job}\n"
    assert json.loads(edgefl("jobs", "logs", job, "--lines", 1, "--json", "-").stdout) == {
        "job": job, "lines": [f"three job={job}"], "cut": True,
    }  # fmt: skip
    http_plane.enroll("a")
    assert "a device sends the end of its own log" in str(
        edgefl("jobs", "logs", job, "--follow", "--device", "a").exception
    )
    assert "device a is offline" in str(edgefl("jobs", "logs", job, "--device", "a").exception)


def test_the_clouds_log_of_a_job_is_followed_to_its_end(edgefl, trainers, plain_task, http_plane, monkeypatch):
    trainers.gate.clear()
    with CloudClient(None, load_credentials(http_plane.credentials)) as client:
        job = submit(client, str(plain_task), load_task(str(plain_task)), JobConfig(rounds=RoundsConfig(count=2)))
    log = http_plane.folder / "cloud.log"
    log.write_text(f"one job={job}\n")

    def a_second_passes(_seconds):
        with log.open("a") as file:
            file.write(f"two job={job}\nthree job=other\n")
        trainers.gate.set()
        for thread in trainers.threads:
            thread.join(10)

    monkeypatch.setattr("edgefl.app.commands.jobs.patience", lambda _line: Patience(pause=a_second_passes))
    assert edgefl("jobs", "logs", job, "--follow").stdout == f"one job={job}\ntwo job={job}\n"
