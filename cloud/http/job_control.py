"""Routes about jobs that run: pause, resume, continue from a kept round, and which devices were chosen."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import Field

from cloud.http.jobs import MAX_NAME_CHARS
from cloud.http.shared import Body, Here, known
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError
from edgefl.protocols.messages import BlobRef

operator = APIRouter()


class ContinueRequest(Body):
    """A new job that starts after a kept round of another; without `bundle` and `task` it has the same code."""

    round: int | None = Field(default=None, ge=1, lt=1 << 31)  # None = the last one
    config: dict[str, Any] = Field(default_factory=dict)
    bundle: BlobRef | None = None
    task: str | None = None
    label: str | None = Field(default=None, max_length=MAX_NAME_CHARS)
    key: str | None = Field(default=None, pattern="^[0-9a-f]{32}$")


@operator.post("/v1/jobs/{job}/pause")
def pause(job: str, here: Here) -> dict[str, str]:
    """Pause a job after its open round."""
    _refuse_relay(job)
    return {"id": job, "state": here.control.pause(job)}


@operator.post("/v1/jobs/{job}/resume")
def resume(job: str, here: Here) -> dict[str, str]:
    """Let a paused job go on."""
    _refuse_relay(job)
    return {"id": job, "state": here.control.resume(job)}


@operator.post("/v1/jobs/{job}/continue")
def continue_job(job: str, body: ContinueRequest, here: Here) -> dict[str, str]:
    """Start a new job from a kept round of this one."""
    _refuse_relay(job)
    config = from_dict(JobConfig, body.config)
    new = here.control.continued(
        job, body.round, config, key=body.key, label=body.label, bundle=body.bundle, task=body.task
    )
    return {"id": new}


@operator.get("/v1/jobs/{job}/devices")
def devices(job: str, here: Here) -> list[dict[str, Any]]:
    """Return of each device whether it is in the job's latest cohort, and if not, why."""
    _refuse_relay(job)
    known(here.jobs.row, job)
    states = {device.name: here.link.state(device.name) for device in here.enrolment.devices()}
    return here.control.devices(job, {name: one is not None and one.online for name, one in states.items()})


def _refuse_relay(job: str) -> None:
    if job.startswith("relay-"):
        raise ConfigError(f"{job} relays a Flower app's messages: its ServerApp chooses devices and ends it")
