"""Whether a device may train in parts now, and from what: read from the cloud's database, beside the cloud.

Everything that is not the device's own is from the job: its code (whose signature is checked), its settings, and the
tensors of the cloud's part at the beginning of the round. A device chooses nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloud.split.process import SessionEnded
from cloud.split.records import SessionSpec
from cloud.state.blobs import BlobStore
from cloud.state.jobs import UNFINISHED, JobRow, Jobs
from edgefl.aggregation.schedules import of_round
from edgefl.errors import EdgeflError
from edgefl.protocols.manifest import Bundle, verify
from edgefl.protocols.messages import Signed
from edgefl.protocols.split.messages import VERSION, BeginTraining
from edgefl.settings.split import SPLIT

MAX_SAMPLES = 1 << 22  # of one device: their keys are kept in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpec:
    """What a job's training process needs."""

    job: str
    bundle: Path
    task: str
    train: dict[str, Any]


class SplitJobs:
    """The jobs of a home that are trained in parts. Its methods block."""

    def __init__(self, engine: sa.Engine, blobs: BlobStore, fleet_key: Ed25519PublicKey) -> None:
        self._jobs, self._blobs, self._key = Jobs(engine, blobs, _no_signature), blobs, fleet_key

    def unfinished(self) -> Sequence[str]:
        return self._jobs.unfinished()

    def rounds_done(self, job: str) -> int:
        return self._jobs.load(job).rounds_done

    def admit(self, device: str, begin: BeginTraining) -> tuple[SessionSpec, TrainingSpec]:
        """Return what the device's session and its process need; raises SessionEnded with the reason if it may not."""
        if begin.version != VERSION:
            raise SessionEnded(
                "FAILED_PRECONDITION",
                f"device {device} speaks version {begin.version} of split training, this server {VERSION}; update the "
                "older one",
            )
        row = self._row(device, begin)
        bundle = self._bundle(row, begin)
        train = of_round(row.config, begin.round)
        if row.frozen is None or begin.samples > MAX_SAMPLES:
            raise SessionEnded(
                "INVALID_ARGUMENT", f"a training of {begin.samples} samples; at most {MAX_SAMPLES} are possible"
            )
        session = SessionSpec(
            device=device, round=begin.round, tensors=str(self._blobs.path(row.frozen.sha256).absolute()), train=train,
            inputs=begin.inputs, samples=begin.samples, steps=begin.steps, rank=begin.rank,
        )  # fmt: skip
        # The process is the same for all rounds: what a round changes comes with its sessions.
        settings = json.loads(session.encode())["train"] | {"round": 0, "lr": row.config.train.lr}
        archive = self._blobs.path(bundle.blob.sha256).absolute()
        return session, TrainingSpec(job=row.id, bundle=archive, task=bundle.task, train=settings)

    def _row(self, device: str, begin: BeginTraining) -> JobRow:
        try:
            row = self._jobs.load(begin.job)
        except sa.exc.NoResultFound as cause:
            raise SessionEnded("NOT_FOUND", f"there is no job {begin.job!r} on this cloud") from cause
        if row.config.train.mode != SPLIT:
            raise SessionEnded("FAILED_PRECONDITION", f"job {row.id} is not trained in parts: train.mode is local")
        if row.state not in UNFINISHED or row.rounds_done != begin.round - 1:
            raise SessionEnded(
                "FAILED_PRECONDITION",
                f"round {begin.round} of job {row.id} is not open: {row.rounds_done} rounds are done, and it is "
                f"{row.state}",
            )
        if device not in row.cohort:
            raise SessionEnded(
                "PERMISSION_DENIED", f"device {device!r} is not asked to train in round {begin.round} of job {row.id}"
            )
        return row

    def _bundle(self, row: JobRow, begin: BeginTraining) -> Bundle:
        try:
            bundle = verify(row.bundle, Bundle, self._key)
            self._blobs.check(bundle.blob.sha256)
        except EdgeflError as cause:
            raise SessionEnded("FAILED_PRECONDITION", f"the code of job {row.id} cannot be used: {cause}") from cause
        if bundle.blob.sha256 != begin.bundle:
            raise SessionEnded(
                "FAILED_PRECONDITION",
                f"the device has the code {begin.bundle[:16]}..., job {row.id} has {bundle.blob.sha256[:16]}...; it "
                "will be given the right one with its next assignment",
            )
        return bundle


def _no_signature(_bundle: Bundle) -> Signed:
    raise RuntimeError("the split training's server signs nothing")
