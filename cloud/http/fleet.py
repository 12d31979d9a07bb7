"""Routes about devices: health, the CA, enrolment, tokens, and the fleet's list."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from cloud.http.services import Services
from cloud.http.shared import Body, CleanJSON, Here, known
from cloud.state.enrolment import DEVICE, VALID_FOR_S, EnrolledDevice
from edgefl.errors import ConfigError, NotFound
from edgefl.process.log_tail import MAX_RECORDS
from edgefl.process.version import __version__
from edgefl.protocols.tls import CLOUD_NAME

public = APIRouter()
operator = APIRouter()


class EnrolRequest(Body):
    """A device's enrolment request; `csr` is in PEM format."""

    secret: str = Field(max_length=200)
    name: str = Field(max_length=200)
    tags: dict[str, str] = Field(default_factory=dict)
    csr: str = Field(max_length=16 << 10)
    role: str = Field(default=DEVICE, max_length=20)
    parent: str = Field(default=CLOUD_NAME, max_length=200)  # the region that passed the request on


class TokenRequest(Body):
    """How long the new token is valid."""

    valid_for_s: float = VALID_FOR_S
    label: str | None = None
    role: Literal["device", "region"] = "device"


class AssignRequest(Body):
    """Which devices get which parents: regions by name, and `cloud`."""

    pattern: str = Field(max_length=200)
    parents: list[str] = Field(max_length=1000)


@public.get("/v1/health")
def health(here: Here) -> CleanJSON:
    """Return the health of the cloud's parts (503 if one is unhealthy) and the time, to compare a device's clock."""
    reasons = here.health()
    well = not any(reasons.values())
    parts = {name: {"ok": not reason, "reason": reason} for name, reason in reasons.items()}
    facts = {"status": "ok" if well else "failing", "version": __version__, "time": time.time(), "parts": parts,
             "broker": here.broker}  # fmt: skip
    return CleanJSON(facts, 200 if well else 503)


@public.get("/v1/ca")
async def ca(here: Here) -> Response:
    """Return the CA's certificate; the client compares it with the fingerprint in its token."""
    return Response(here.ca_pem, media_type="application/x-pem-file")


@public.get("/v1/crl")
def crl(here: Here) -> Response:
    """Return the list of revoked certificates, for a broker on another machine."""
    return Response(here.enrolment.crl(), media_type="application/x-pem-file")


@public.post("/v1/enroll", response_class=JSONResponse)  # PEM has several lines
def enroll(body: EnrolRequest, here: Here) -> dict[str, Any]:
    """Turn a one-time token and a signing request into a certificate."""
    here.members.check_parent(body.name, body.parent)
    certificate = here.enrolment.enroll(
        body.secret, body.name, body.tags, body.csr.encode(), role=body.role, parent=body.parent
    )
    here.members.note_change()
    return {
        "certificate": certificate.decode(),
        "ca": here.ca_pem.decode(),
        "fleet_key": here.fleet_key_pem.decode(),
        "grpc_port": here.grpc_port,
        "broker": here.broker_url,
        "server": "",
    }


@operator.get("/v1/status")
def status(here: Here) -> dict[str, Any]:
    """Return how the cloud is: health of its parts, ports, devices, jobs."""
    known_devices = here.enrolment.devices()
    online = [one for one in known_devices if (state := here.link.state(one.name)) is not None and state.online]
    states = [row["state"] for row in here.jobs.list()]
    running = states.count("running")
    return {
        "version": __version__,
        "parts": dict(here.health()),
        "broker": here.broker,
        "ports": {"grpc": here.grpc_port, "broker": urlsplit(here.broker_url).port or 0},
        "devices": {"known": len(known_devices), "online": len(online)},
        "jobs": {
            "running": min(running, here.max_jobs),
            "queued": max(0, running - here.max_jobs),
            "paused": states.count("paused"),
        },
    }


@operator.get("/v1/devices")
def devices(here: Here) -> list[dict[str, Any]]:
    """Return every device with its last reported state."""
    return [_shown(here, device) for device in here.enrolment.devices()]


@operator.get("/v1/regions")
def regions(here: Here) -> list[dict[str, Any]]:
    """Return every region with its parent, and what it says of itself while it is connected."""
    states = here.regions()
    members = here.members.members()
    return [
        {"name": name, "parent": one.parents[0], "online": name in states,
         "state": dataclasses.asdict(states[name]) if name in states else None}
        for name, one in sorted(members.items()) if one.is_region
    ]  # fmt: skip


@operator.post("/v1/devices/assign")
def assign(body: AssignRequest, here: Here) -> dict[str, Any]:
    """Set the ordered parents of the devices whose names match a pattern."""
    return {"devices": here.members.assign(body.pattern, body.parents), "parents": body.parents}


@operator.delete("/v1/devices/{name}")
def remove(name: str, here: Here) -> dict[str, Any]:
    """Remove a device or a region, and reject its certificate from now on."""
    reassigned = here.members.let_go(name)
    if reassigned:
        here.members.note_change()  # a region tells the devices that it loses where to go
    known(here.enrolment.remove, name)
    here.members.note_change()
    here.rollouts.forget(name)
    here.link.forget(name)
    return {"removed": name, "reassigned": reassigned}


@operator.get("/v1/devices/{name}/log")
def device_log(
    name: str, here: Here, lines: Annotated[int, Query(ge=1, le=MAX_RECORDS)] = 200, job: str = ""
) -> dict[str, Any]:
    """Return the end of a device's own log, which the device uploads now; with `job`, what it says of that job."""
    if not here.enrolment.is_known(name):
        raise NotFound(f"there is no device {name!r}; list them with `edgefl devices list`")
    if here.device_logs is None:
        raise ConfigError("this cloud does not fetch the logs of devices")
    found = here.device_logs.fetch(name, lines, job)
    return {"device": name, "lines": found.lines, "cut": found.cut}


@operator.post("/v1/tokens")
def new_token(body: TokenRequest, here: Here) -> dict[str, Any]:
    """Make a one-time enrolment token."""
    return {"token": here.enrolment.new_token(body.valid_for_s, body.label, body.role), "valid_for_s": body.valid_for_s}


def _shown(here: Services, device: EnrolledDevice) -> dict[str, Any]:
    state = here.link.state(device.name)
    said: dict[str, Any] = dataclasses.asdict(state) if state else {"online": False, "models": {}, "serving_url": ""}
    for internal in ("session", "commands"):
        said.pop(internal, None)
    telemetry = here.link.telemetry(device.name)
    said["via"] = here.link.via(device.name) if said["online"] else ""
    said["telemetry"] = dataclasses.asdict(telemetry) if telemetry is not None else None
    return dataclasses.asdict(device) | said | {"tags": {**device.tags, **said.get("tags", {})}}
