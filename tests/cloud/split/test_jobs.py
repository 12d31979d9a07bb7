"""Who may train, and from what: every refusal, by the rows of a real database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud.split.jobs import SplitJobs
from cloud.split.process import SessionEnded
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.store import open_database
from edgefl.config import JobConfig, RoundsConfig
from edgefl.protocols.manifest import sign
from edgefl.protocols.messages import Division
from edgefl.protocols.split.messages import BeginTraining
from tests.cloud.split.bench import settings


class Cloud:
    """Jobs in a home, with a round that is open for cam-1."""

    def __init__(self, home: Path) -> None:
        key = Ed25519PrivateKey.generate()
        engine = open_database(home / "cloud.db")
        self.blobs = BlobStore(home / "blobs")
        self.jobs = Jobs(engine, self.blobs, lambda bundle: sign(bundle, key))
        self.bundle = self.blobs.put(b"code")
        self.frozen = self.blobs.put_tree({"head": np.ones(1, np.float32)})
        self.split = SplitJobs(engine, self.blobs, key.public_key())
        self.other = SplitJobs(engine, self.blobs, Ed25519PrivateKey.generate().public_key())

    def submit(self, config: JobConfig, division: Division | None) -> str:
        model = self.blobs.put_tree({"first": np.ones(1, np.float32)})
        job = self.jobs.submit("m:task", self.bundle, model, [], config, frozen=self.frozen, division=division)
        self.jobs.open_round(job, 1, ["cam-1"])
        return job

    def begin(self, job: str, **more: Any) -> BeginTraining:
        given = {
            "version": 1,
            "round": 1,
            "bundle": self.bundle.sha256,
            "samples": 5,
            "steps": 7,
            "inputs": "[]",
        } | more
        return BeginTraining(job=job, **given)


@pytest.fixture
def here(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


DIVISION = Division(in_cloud={"head": "head"}, buffers=[])


def test_a_device_gets_the_job_s_code_settings_and_tensors(here: Cloud) -> None:
    config = JobConfig(train=settings(schedule="cosine", round=0), rounds=RoundsConfig(count=3))
    job = here.submit(config, DIVISION)
    session, training = here.split.admit("cam-1", here.begin(job))
    assert (session.device, session.round, session.samples, session.steps) == ("cam-1", 1, 5, 7)
    assert session.train.round == 1
    assert Path(session.tensors).name == here.frozen.sha256
    assert (training.job, training.task, training.bundle.name) == (job, "m:task", here.bundle.sha256)
    assert here.split.unfinished() == [job]
    assert here.split.rounds_done(job) == 0


def test_every_other_stream_is_refused_in_words(here: Cloud) -> None:
    job = here.submit(JobConfig(train=settings(round=0)), DIVISION)
    local = here.submit(JobConfig(), None)
    for device, begin, status, reason in (
        ("cam-2", here.begin(job), "PERMISSION_DENIED", "'cam-2' is not asked to train in round 1"),
        ("cam-1", here.begin("job-none"), "NOT_FOUND", "there is no job 'job-none'"),
        ("cam-1", here.begin(local), "FAILED_PRECONDITION", "is not trained in parts"),
        ("cam-1", here.begin(job, round=2), "FAILED_PRECONDITION", "round 2 .* is not open: 0 rounds are done"),
        ("cam-1", here.begin(job, bundle="f" * 64), "FAILED_PRECONDITION", "the device has the code ffff"),
        ("cam-1", here.begin(job, version=2), "FAILED_PRECONDITION", "speaks version 2 .* this server 1; update"),
        ("cam-1", here.begin(job, samples=1 << 30), "INVALID_ARGUMENT", "a training of 1073741824 samples"),
    ):
        with pytest.raises(SessionEnded, match=reason) as refused:
            here.split.admit(device, begin)
        assert refused.value.status == status
    with pytest.raises(SessionEnded, match=r"the code of job .* cannot be used"):
        here.other.admit("cam-1", here.begin(job))
    here.jobs.end(job, "cancelled")
    with pytest.raises(SessionEnded, match="and it is cancelled"):
        here.split.admit("cam-1", here.begin(job))
