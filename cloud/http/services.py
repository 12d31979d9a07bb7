"""The parts of a cloud that the HTTPS plane uses; two of them are protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cloud.dataplane.device_logs import DeviceLogs
from cloud.dataplane.relays import Relays
from cloud.jobs.control import JobControl
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import Enrolment
from cloud.state.members import Members
from cloud.state.registry import Registry
from cloud.state.rollout import Rollouts
from cloud.state.storage import Storage
from edgefl.config import JobConfig
from edgefl.protocols.messages import BlobRef, DeviceState, Division, Telemetry
from edgefl.protocols.tiers import RegionState
from edgefl.records import EvaluationSpec

Rows = list[dict[str, Any]]


class JobService(Protocol):
    """Jobs as an operator sees them. Methods block and may be called from any thread.

    An unknown id raises ConfigError. A job has the keys id, state (running | paused | done | failed |
    cancelled),
    error, model and rounds.
    """

    def submit(  # noqa: PLR0913 - the fields of the request
        self, task: str, bundle: BlobRef, parameters: BlobRef, buffers: Sequence[str], config: JobConfig,
        key: str | None = None, *, parted: bool = False, frozen: BlobRef | None = None, name: str | None = None,
        label: str | None = None, evaluation: EvaluationSpec | None = None, division: Division | None = None,
    ) -> str:  # fmt: skip
        """Start a job and return its id; raises ConfigError or ProtocolError for what cannot be run."""

    def list(self) -> Rows:
        """Return every job, the newest first."""

    def get(self, job: str) -> dict[str, Any]:
        """Return one job."""

    def row(self, job: str) -> dict[str, Any]:
        """Return one job without its rounds."""

    def follow(self, job: str, after: int) -> AbstractContextManager[Callable[[int], None]]:
        """Follow a job's rounds above `after`; a round is kept until the reader confirms it."""

    def rounds_after(self, job: str, number: int, limit: int | None = None) -> Rows:
        """Return the outcomes of the finished rounds above `number`, in order, at most `limit`."""

    def keep_metrics(self, job: str, number: int, metrics: Mapping[str, float | None]) -> bool:
        """Store evaluated metrics of a finished round; False if the round is no longer kept."""

    def wait(self, job: str, rounds_seen: int, timeout_s: float) -> bool:
        """Wait until a round after `rounds_seen` is finished or the job has ended; False at the timeout."""

    def cancel(self, job: str) -> None:
        """Stop a running job; do nothing if it has ended."""


class Link(Protocol):
    """Presence, as the operator's plane needs it."""

    def state(self, device: str) -> DeviceState | None:
        """Return a device's last reported state."""

    def via(self, device: str) -> str:
        """Return the region through which a device is connected; empty = directly."""

    def telemetry(self, device: str) -> Telemetry | None:
        """Return the latest telemetry of an online device."""

    def forget(self, device: str) -> None:
        """Forget a device's state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """The parts of one cloud, and the data that it sends to devices and operators."""

    enrolment: Enrolment
    members: Members
    registry: Registry
    rollouts: Rollouts
    jobs: JobService
    control: JobControl
    relays: Relays
    blobs: BlobStore
    link: Link
    ca_pem: bytes
    fleet_key_pem: bytes  # the public half
    grpc_port: int
    broker_url: str
    operator_token: str
    storage: Storage = field(default_factory=Storage)
    max_blob_bytes: int = 256 << 30  # operators are trusted; a full disk is reported as such
    heartbeat_s: float = 5.0  # of event streams in which nothing happens
    chunk_deadline_s: float = 60.0  # for the next bytes of an upload
    device_logs: DeviceLogs | None = None  # None = devices are not asked for their logs
    log_file: Path | None = None  # of the cloud itself
    max_jobs: int = 8  # that run at the same time; others wait
    regions: Callable[[], Mapping[str, RegionState]] = dict  # those that are connected, as they say themselves
    broker: str = "builtin"  # which program it is: mosquitto (the cloud's child), builtin, or external
    health: Callable[[], Mapping[str, str]] = dict  # why each part of the cloud is unhealthy; empty = it is healthy
