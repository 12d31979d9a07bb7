"""A region's HTTPS plane: health, the CA, revoked certificates, and enrolment, which its parent decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from cloud.http.api import BodyLimit
from cloud.http.shared import CleanJSON
from cloud.http.strangers import EnrolmentLimit
from edgefl.process.version import __version__
from edgefl.protocols.tls import Identity, client_context

PARENT_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionServices:
    """What a region's HTTPS plane shows."""

    name: str
    parent_url: str
    parent_server_name: str
    identity: Identity
    grpc_port: int
    broker_url: str
    health: Callable[[], Mapping[str, str]]
    crl: Callable[[], bytes]
    devices: Callable[[], Mapping[str, int]]


def make_region_app(services: RegionServices) -> FastAPI:
    """Return the application of one region."""
    app = FastAPI(
        title="edgefl region", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
        default_response_class=CleanJSON,
    )  # fmt: skip

    @app.get("/v1/health")
    def health() -> CleanJSON:
        reasons = services.health()
        well = not any(reasons.values())
        parts = {name: {"ok": not reason, "reason": reason} for name, reason in reasons.items()}
        facts = {"status": "ok" if well else "failing", "version": __version__, "time": time.time(), "parts": parts,
                 "region": services.name, "devices": dict(services.devices())}  # fmt: skip
        return CleanJSON(facts, 200 if well else 503)

    @app.get("/v1/ca")
    def ca() -> Response:
        named = {"edgefl-region": services.name}  # the only name in this server's certificate
        return Response(services.identity.ca.read_bytes(), media_type="application/x-pem-file", headers=named)

    @app.get("/v1/crl")
    def crl() -> Response:
        return Response(services.crl(), media_type="application/x-pem-file")

    @app.post("/v1/enroll", response_class=JSONResponse)
    async def enroll(request: Request) -> JSONResponse:
        try:
            body = await request.json()
        except ValueError:
            return JSONResponse({"error": "the request's body is not JSON"}, 422)
        if isinstance(body, dict):
            body.setdefault("parent", services.name)
        status, answer = await anyio.to_thread.run_sync(_ask_parent, services, body)
        if status < 400:
            answer |= {"grpc_port": services.grpc_port, "broker": services.broker_url, "server": services.name}
        return JSONResponse(answer, status)

    app.add_middleware(BodyLimit)
    app.add_middleware(EnrolmentLimit)
    return app


def _ask_parent(services: RegionServices, body: Any) -> tuple[int, dict[str, Any]]:
    context = client_context(services.identity.ca, None, services.parent_server_name)
    try:
        with httpx.Client(verify=context, timeout=PARENT_S, trust_env=False) as client:
            answer = client.post(f"{services.parent_url}/v1/enroll", json=body)
            return answer.status_code, dict(answer.json())
    except (httpx.HTTPError, ValueError) as error:
        return 503, {"error": f"region {services.name} cannot ask its parent {services.parent_url} now: {error}"}
