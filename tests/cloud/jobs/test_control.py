"""Pausing, resuming, and continuing from a kept round."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from cloud.jobs.choice import ChoiceBoard, Reason
from cloud.jobs.control import JobControl
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.store import jobs as table
from cloud.state.store import open_database
from edgefl.config import JobConfig, RoundsConfig
from edgefl.errors import ConfigError, NotFound
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.records import RoundOutcome
from edgefl.settings.server import ServerConfig


@pytest.fixture
def home(tmp_path):
    engine, blobs, key = open_database(tmp_path / "cloud.db"), BlobStore(tmp_path / "blobs"), new_fleet_key()

    def signed(bundle):
        return sign(bundle, key)

    jobs, board = Jobs(engine, blobs, signed), ChoiceBoard()
    yield jobs, JobControl(engine, jobs, blobs, signed, board), blobs, board
    engine.dispose()


def submit(jobs, blobs, **rounds):
    config = JobConfig(rounds=RoundsConfig(**rounds))
    tree = blobs.put_tree({"w": np.zeros(1, np.float32)})
    return jobs.submit("t:t", blobs.put(b"zip"), tree, (), config, name="T")


def finish(jobs, blobs, job, number):
    jobs.open_round(job, number, ["a"], {"b": ("select", "mem_mb is 1")})
    outcome = RoundOutcome(
        job=job, round=number, parameters={}, admitted=("a",), rejected={}, failed={}, missing=(), weight=1.0,
        metrics={}, seconds=1.0, up_bytes=0, down_bytes=0,
    )  # fmt: skip
    model = blobs.put_tree({"w": np.full(1, number, np.float32)})
    jobs.finish_round(outcome, model, blobs.put(b"momentum %d" % number).sha256)
    return model


def test_a_job_is_paused_and_resumed_once(home):
    jobs, control, blobs, _ = home
    job, heard = submit(jobs, blobs), []
    control.paused, control.resumed = lambda one: heard.append(("paused", one)), lambda one: heard.append(("on", one))
    assert (control.pause(job), control.pause(job)) == ("paused", "paused")
    assert (jobs.running(), jobs.unfinished()) == ([], [job])
    assert jobs.row(job)["waiting"] == f"waiting for `edgefl jobs resume {job}`"
    assert (control.resume(job), control.resume(job)) == ("running", "running")
    assert heard == [("paused", job), ("on", job)]
    control.pause(job)
    jobs.cancel(job)
    for act in (control.pause, control.resume):
        with pytest.raises(ConfigError, match=r"has ended \(cancelled\)"):
            act(job)
    with pytest.raises(NotFound, match="no job 'job-x'"):
        control.pause("job-x")


def test_a_job_continues_from_a_kept_round(home):
    jobs, control, blobs, _ = home
    job, started = submit(jobs, blobs, count=5, priority=3), []
    models = [finish(jobs, blobs, job, number) for number in (1, 2, 3)]
    jobs.forget_model_of(job, 1)
    jobs.started = started.append
    new = control.continued(job, 2, jobs.load(job).config, key="ab" * 16, label="again")
    assert control.continued(job, 2, jobs.load(job).config, key="ab" * 16) == new  # sent again
    row = jobs.load(new)
    assert (started, row.rounds_done, row.model) == ([new], 2, models[1])
    assert blobs.path(row.optimizer_sha256).read_bytes() == b"momentum 2"
    shown = jobs.row(new)
    assert (shown["continues"], shown["label"], shown["name"]) == (f"{job} round 2", "again", "T")
    assert control.priority(new) == 3
    assert jobs.load(control.continued(job, None, jobs.load(job).config)).rounds_done == 3
    with pytest.raises(ConfigError, match=r"round 1 of job .* is not kept; kept are: 2, 3. .*--kept-models"):
        control.continued(job, 1, jobs.load(job).config)
    with pytest.raises(ConfigError, match=r"rounds.count=3 counts all rounds, also the 3 of job"):
        control.continued(job, 3, JobConfig(rounds=RoundsConfig(count=3)))
    with pytest.raises(ConfigError, match=r"\[server\] is .*keeps it"):
        control.continued(job, 3, JobConfig(server=ServerConfig(lr=0.5)))


def test_a_job_of_an_older_cloud_continues_though_it_knew_fewer_settings(home, tmp_path):
    jobs, control, blobs, _ = home
    job = submit(jobs, blobs, count=5)
    finish(jobs, blobs, job, 1)
    stored = asdict(JobConfig(rounds=RoundsConfig(count=5)))
    del stored["server"]["fragments"]
    engine = open_database(tmp_path / "cloud.db")
    with engine.begin() as db:
        db.execute(table.update().where(table.c.id == job).values(config=stored))
    engine.dispose()
    config = jobs.load(job).config
    assert jobs.load(control.continued(job, 1, config)).rounds_done == 1
    with pytest.raises(ConfigError, match=r"\[server\] is .*'fragments': 2.*but job .*'fragments': 1.*keeps it"):
        control.continued(job, 1, replace(config, server=ServerConfig(fragments=2)))


def test_devices_and_why_they_were_not_chosen(home):
    jobs, control, blobs, board = home
    job = submit(jobs, blobs)
    fleet = {"a": True, "b": True, "c": False, "d": True}
    assert {one["device"]: one["code"] for one in control.devices(job, fleet)} == {
        "a": "", "b": "", "c": "offline", "d": "",
    }  # fmt: skip
    finish(jobs, blobs, job, 1)
    lines = {one["device"]: (one["code"], one["reason"]) for one in control.devices(job, fleet)}
    assert lines == {
        "a": ("chosen", ""), "b": ("select", "mem_mb is 1"), "c": ("offline", "it is offline"), "d": ("", ""),
    }  # fmt: skip
    board.reasons[job] = {"d": Reason("busy", "it works for job-2")}
    assert control.devices(job, fleet)[3]["code"] == "busy"
