"""Pausing, continuing and asking for the devices of jobs over HTTPS."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.config import JobConfig, RoundsConfig
from edgefl.errors import CloudRefused, NotFound
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.protocols.messages import DeviceState
from edgefl.records import RoundOutcome


@pytest.fixture
def client(http_plane):
    with CloudClient(http_plane.url, load_credentials(http_plane.credentials)) as client:
        yield client


@pytest.fixture
def job(http_plane):
    tree = http_plane.blobs.put_tree({"w": np.zeros(1, np.float32)})
    return http_plane.jobs.submit("t:t", http_plane.blobs.put(b"zip"), tree, (), JobConfig())


def finish(plane, job):
    plane.jobs.open_round(job, 1, ["a"], {"b": ("policy", "its own policy: not-idle (60%)")})
    outcome = RoundOutcome(
        job=job, round=1, parameters={}, admitted=("a",), rejected={}, failed={}, missing=(), weight=1.0, metrics={},
        seconds=1.0, up_bytes=0, down_bytes=0,
    )  # fmt: skip
    plane.jobs.finish_round(outcome, plane.blobs.put_tree({"w": np.ones(1, np.float32)}), None)


def test_pause_and_resume(http_plane, client, job):
    assert client.pause_job(job) == {"id": job, "state": "paused"}
    assert client.status()["jobs"] == {"running": 0, "queued": 0, "paused": 1}
    assert client.job(job)["waiting"] == f"waiting for `edgefl jobs resume {job}`"
    assert client.resume_job(job) == {"id": job, "state": "running"}
    http_plane.jobs.end(job, "done")
    with pytest.raises(CloudRefused, match="nothing to pause"):
        client.pause_job(job)
    for call in (client.pause_job, client.resume_job, client.job_devices):
        with pytest.raises(NotFound):
            call("job-none")
        with pytest.raises(CloudRefused, match="relays a Flower app's messages"):
            call("relay-1")


def test_a_new_job_continues_another(http_plane, client, job):
    with pytest.raises(CloudRefused, match="kept are: none"):
        client.continue_job(job, JobConfig(), "a" * 32)
    finish(http_plane, job)
    new = client.continue_job(job, JobConfig(rounds=RoundsConfig(count=3)), "b" * 32, label="on")
    assert client.job(new)["continues"] == f"{job} round 1"
    with pytest.raises(CloudRefused, match=r"rounds\.count=1 counts all rounds"):
        client.continue_job(job, JobConfig(rounds=RoundsConfig(count=1)), "c" * 32)


def test_devices_and_why_they_were_not_chosen(http_plane, client, job):
    http_plane.enroll("a", "b", "c")
    http_plane.link.states["a"] = DeviceState(session=1, online=True, agent_version="0")
    finish(http_plane, job)
    assert client.job_devices(job) == [
        {"device": "a", "round": 1, "code": "chosen", "reason": ""},
        {"device": "b", "round": 1, "code": "policy", "reason": "its own policy: not-idle (60%)"},
        {"device": "c", "round": 1, "code": "offline", "reason": "it is offline"},
    ]
