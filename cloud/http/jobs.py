"""Routes about bytes and jobs: upload and download blobs, submit, watch and cancel.

A relay is listed, shown and cancelled as a job; what else it does is in `cloud.http.relays`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any

import anyio.from_thread
import anyio.to_thread
from fastapi import APIRouter, HTTPException, Path, Query, Request
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import Field
from starlette.requests import ClientDisconnect

from cloud.http.services import Services
from cloud.http.shared import HEARTBEAT, UPLOAD_PATH, Body, Here, known, stream_lines
from cloud.jobs.reach import refuse_sums
from cloud.state.blobs import BlobStore
from cloud.state.jobs import ENDED
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError, ProtocolError
from edgefl.guards import MAX_EVALUATED
from edgefl.guards import MAX_NAME_CHARS as MAX_METRIC_CHARS
from edgefl.hashing import HashingFile
from edgefl.process.log_tail import MAX_RECORDS, LogTail, of_job, read_tail
from edgefl.protocols.labels import meant_by
from edgefl.protocols.messages import MAX_TENSORS, BlobRef, Division
from edgefl.records import EvaluationSpec

MAX_NAME_CHARS = 500
ROUNDS_AT_ONCE = 200  # read into memory at once, for a reader that is behind

operator = APIRouter()


class EvaluationRequest(Body):
    """What the devices of a job evaluate: see `records.EvaluationSpec`."""

    directions: dict[Annotated[str, Field(max_length=MAX_METRIC_CHARS)], bool | None] = Field(max_length=MAX_EVALUATED)
    declared: bool = True


class DivisionRequest(Body):
    """What a job in parts trains in the cloud: see `messages.Division`."""

    in_cloud: dict[str, str] = Field(max_length=MAX_TENSORS)
    buffers: list[str] = Field(max_length=MAX_TENSORS)
    device_frozen: BlobRef | None = None


class JobRequest(Body):
    """A job: its configuration, and the already uploaded bundle and first parameters."""

    task: str
    bundle: BlobRef
    parameters: BlobRef
    buffers: list[str] = Field(default_factory=list)
    parted: bool = False  # the parameters are what is trained and the buffers, and `frozen` all other tensors
    frozen: BlobRef | None = None
    name: str | None = Field(default=None, max_length=MAX_NAME_CHARS)  # of the task, for people
    label: str | None = Field(default=None, max_length=MAX_NAME_CHARS)  # of the job, for people
    evaluation: EvaluationRequest | None = None  # None = devices do not evaluate
    division: DivisionRequest | None = None  # of a job in parts
    config: dict[str, Any] = Field(default_factory=dict)
    key: str | None = Field(
        default=None, pattern="^[0-9a-f]{32}$"
    )  # of this request: sent again, it starts nothing new


class RoundMetrics(Body):
    """Metrics of the model after a round; null = not a finite number."""

    metrics: dict[Annotated[str, Field(max_length=MAX_NAME_CHARS)], Annotated[float, Field(strict=True)] | None]


@operator.put(UPLOAD_PATH)
async def upload(request: Request, here: Here, sha256: str | None = None) -> BlobRef:
    """Store the body as a blob; with `sha256`, only if the body has this digest."""
    return await store_body(request, here.blobs, here, sha256=sha256, max_bytes=here.max_blob_bytes)


async def store_body(
    request: Request, store: BlobStore, here: Services, *, sha256: str | None, max_bytes: int
) -> BlobRef:
    """Write a request's body into a store, a chunk at a time."""
    incoming = _Upload(request.stream(), sha256, max_bytes, here.chunk_deadline_s)
    announced = request.headers.get("content-length", "0")
    incoming.refuse_size(int(announced) if announced.isdecimal() else 0)
    try:
        return await anyio.to_thread.run_sync(store.write, incoming.fill)
    except ClientDisconnect as cause:
        raise HTTPException(400, "the upload was cut off; nothing was stored") from cause


@operator.get(UPLOAD_PATH + "/{sha256}")
def download(sha256: str, here: Here) -> FileResponse:
    """Return a blob after its hash was checked; supports range requests."""
    here.blobs.check(sha256)
    return FileResponse(here.blobs.path(sha256), media_type="application/octet-stream")


@operator.post("/v1/jobs")
def submit(body: JobRequest, here: Here) -> dict[str, str]:
    """Start a job."""
    config = from_dict(JobConfig, body.config)
    states = {one.name: here.link.state(one.name) for one in here.enrolment.devices()}
    refuse_sums(config, {name: here.link.via(name) for name, one in states.items() if one is not None and one.online})
    job = here.jobs.submit(
        body.task, body.bundle, body.parameters, body.buffers, config, body.key, parted=body.parted,
        frozen=body.frozen, name=body.name, label=body.label,
        evaluation=None if body.evaluation is None else EvaluationSpec(**body.evaluation.model_dump()),
        division=None if body.division is None else Division(
            in_cloud=body.division.in_cloud, buffers=body.division.buffers, device_frozen=body.division.device_frozen
        ),
    )  # fmt: skip
    return {"id": job}


@operator.get("/v1/jobs")
def jobs(here: Here, named: str | None = None) -> list[dict[str, Any]]:
    """Return every job and relay, the newest first; with `named`, those that it may mean (see `meant_by`)."""
    found = [*here.jobs.list(), *here.relays.rows()]
    found = found if named is None else meant_by(named, found)
    return sorted(found, key=lambda row: row["created_s"], reverse=True)


@operator.get("/v1/jobs/{job}")
def job(job: str, here: Here) -> dict[str, Any]:
    """Return a job with its rounds, or a relay."""
    return known(here.relays.get if _is_relay(job) else here.jobs.get, job)


@operator.get("/v1/jobs/{job}/log")
def job_log(
    job: str, here: Here, lines: Annotated[int, Query(ge=1, le=MAX_RECORDS)] = 200,
    after: Annotated[str, Query(pattern=r"^(\d{1,20}:\d{1,20})?$")] = "",
) -> dict[str, Any]:  # fmt: skip
    """Return the last lines of the cloud's log about a job or a relay; with `after`, those since an `end`.

    `running`: whether the job may still cause lines.
    """
    row = known(
        here.relays.get if _is_relay(job) else here.jobs.row, job
    )  # before its lines: all are there if it ended
    found = LogTail([], cut=False)
    if here.log_file is not None:
        found = read_tail(here.log_file, lines, of_job(job), after=after)
    is_running = row["state"] == "running"
    return {"job": job, "lines": found.lines, "cut": found.cut, "end": found.end, "running": is_running}


@operator.post("/v1/jobs/{job}/cancel")
def cancel(job: str, here: Here) -> dict[str, Any]:
    """Stop a job."""
    if _is_relay(job):
        known(here.relays.get, job)
        here.relays.end(job, "cancelled", "cancelled by its operator")
        return {"id": job, "state": here.relays.get(job)["state"]}
    known(here.jobs.cancel, job)
    return {"id": job, "state": here.jobs.row(job)["state"]}


@operator.put("/v1/jobs/{job}/rounds/{number}/metrics")
def keep_metrics(
    job: str, number: Annotated[int, Path(ge=0, lt=1 << 31)], body: RoundMetrics, here: Here
) -> dict[str, bool]:
    """Store metrics that an operator measured of the model after a round; the last value of a name is kept."""
    if _is_relay(job):
        raise ConfigError(f"{job} relays a Flower app's messages; its metrics are its ServerApp's")
    known(here.jobs.row, job)
    return {"kept": here.jobs.keep_metrics(job, number, body.metrics)}


@operator.get("/v1/jobs/{job}/events")
def events(
    request: Request, job: str, here: Here, after: Annotated[int, Query(ge=0, lt=1 << 31)] = 0
) -> StreamingResponse:
    """Stream one line per finished round above `after`, heartbeats in between, and the job's end as the last line."""
    if _is_relay(job):
        raise ConfigError(f"{job} relays a Flower app's messages and has no rounds; see the output of its `edgefl run`")
    known(here.jobs.row, job)
    return stream_lines(request, job_lines(here, job, after))


def job_lines(here: Services, job: str, seen: int) -> Iterator[Mapping[str, Any]]:
    """Yield a job's rounds as they finish, then its end."""
    with here.jobs.follow(job, seen) as confirm:
        while True:
            row = here.jobs.row(job)  # before the rounds: where it has ended, they are all there
            while outcomes := here.jobs.rounds_after(job, seen, ROUNDS_AT_ONCE):
                for outcome in outcomes:
                    seen = max(seen, int(outcome["round"]))
                    yield outcome
                confirm(seen)
            if row["state"] in ENDED:
                yield {name: row[name] for name in ("state", "error", "model", "last_evaluation", "stopped")}
                return
            if not here.jobs.wait(job, seen, here.heartbeat_s):
                yield {**HEARTBEAT, "waiting": here.jobs.row(job)["waiting"]}


def _is_relay(job: str) -> bool:
    return job.startswith("relay-")


class _Upload:
    """A body on its way into a blob: read in the event loop, written in a worker thread, a chunk at a time."""

    def __init__(self, chunks: AsyncIterator[bytes], sha256: str | None, max_bytes: int, deadline_s: float) -> None:
        self._chunks, self._sha256 = chunks, sha256
        self._max_bytes, self._deadline_s = max_bytes, deadline_s

    def fill(self, file: HashingFile) -> None:
        """Write the whole body to a file; an error prevents the blob from being stored."""
        while (chunk := anyio.from_thread.run(self._next)) is not None:
            self.refuse_size(file.size + len(chunk))
            file.write(chunk)
        if self._sha256 not in {None, file.hexdigest()}:
            raise ProtocolError(
                f"the received bytes have SHA-256 {file.hexdigest()[:16]}..., expected "
                f"{str(self._sha256)[:16]}...; nothing was stored, send them again"
            )

    def refuse_size(self, size: int) -> None:
        """Raise if a blob is too large."""
        if size > self._max_bytes:
            raise HTTPException(413, f"a blob may have {self._max_bytes} bytes at most; nothing was stored")

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await anext(self._chunks, None)
        except TimeoutError as cause:
            message = f"no bytes were received for {self._deadline_s:g} s; nothing was stored"
            raise HTTPException(408, message) from cause
