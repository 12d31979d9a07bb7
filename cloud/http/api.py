"""The HTTPS plane: enrolment for devices, REST for operators, every answer JSON.

Public are health, the CA and enrolment, which the one-time token guards; everything else asks for the
operator's token. Every error is {"error": "..."} with a fitting status. Handlers are synchronous and
run in worker threads; event streams wait in threads of their own, so that they starve nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud.http import fleet as http_fleet
from cloud.http import job_control as http_control
from cloud.http import jobs as http_jobs
from cloud.http import models as http_models
from cloud.http import relays as http_relays
from cloud.http.server import serve_http
from cloud.http.services import Services
from cloud.http.shared import MAX_STREAMS, UPLOAD_PATH, CleanJSON
from cloud.http.strangers import NEEDS_TOKEN, EnrolmentLimit, OperatorFirst, is_operator
from cloud.state.storage import waits_for
from edgefl.errors import (
    CloudStopping,
    ConfigError,
    DeviceUnavailable,
    EdgeflError,
    EnrolmentRefused,
    ManifestRejected,
    NotFound,
    ProtocolError,
    SignatureChanged,
)
from edgefl.process.version import __version__

__all__ = ["make_app", "serve_http"]

MAX_BODY_BYTES = 1 << 20  # of everything but blobs
_STATUS: Mapping[type[EdgeflError], int] = {
    NotFound: 404,
    SignatureChanged: 409,
    ConfigError: 400,
    ProtocolError: 400,
    EnrolmentRefused: 403,
    ManifestRejected: 409,
    CloudStopping: 503,
    DeviceUnavailable: 409,
}


def make_app(services: Services) -> FastAPI:
    """Return the application of one cloud."""
    # No documentation pages: they load scripts from elsewhere.
    app = FastAPI(
        title="edgefl cloud", version=__version__, docs_url=None, redoc_url=None, openapi_url=None,
        default_response_class=CleanJSON,
    )  # fmt: skip
    app.state.services = services
    app.state.stream_threads = anyio.CapacityLimiter(MAX_STREAMS)
    operator = [Depends(_operator)]
    app.include_router(http_fleet.public)
    for router in (
        http_fleet.operator, http_jobs.operator, http_control.operator, http_models.operator, http_relays.operator
    ):  # fmt: skip
        app.include_router(router, dependencies=operator)
    app.add_exception_handler(EdgeflError, _refused)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind in (OSError, DBAPIError):
        app.add_exception_handler(kind, _not_stored)
    app.add_exception_handler(Exception, _bug)
    app.add_middleware(BodyLimit)
    app.add_middleware(EnrolmentLimit)
    app.add_middleware(OperatorFirst, token=services.operator_token)  # the last one added comes first
    return app


class BodyLimit:
    """Refuses a body above MAX_BODY_BYTES before it is in memory; uploads have their own limit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_upload(scope["path"]):
            await self._app(scope, receive, send)
            return
        seen_bytes = 0

        async def counted() -> Message:
            nonlocal seen_bytes
            message = await receive()
            seen_bytes += len(message.get("body", b""))
            if seen_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"the request's body is above {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, counted, send)


def _is_upload(path: str) -> bool:
    return path == UPLOAD_PATH or (path.startswith("/v1/relays/") and "/contents/" in path)


async def _operator(request: Request) -> None:
    """Refuse requests without the operator's token."""
    services: Services = request.app.state.services
    if not is_operator(request.headers.get("authorization", ""), services.operator_token):
        raise HTTPException(401, NEEDS_TOKEN, {"WWW-Authenticate": "Bearer"})


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
    return _error(status, str(error))


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, StarletteHTTPException):
        raise error
    return _error(error.status_code, str(error.detail), error.headers)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    faults = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()]
    return _error(400, "; ".join(faults[:5]))


async def _not_stored(request: Request, error: Exception) -> JSONResponse:
    """Return 503 for a full disk or a busy database; other errors of disk and database are bugs."""
    awaited = waits_for(error)
    if not awaited:
        raise error
    services: Services = request.app.state.services
    await anyio.to_thread.run_sync(services.storage.refused, error)
    cause = getattr(error, "orig", None) or error
    return _error(503, f"the cloud is waiting for {awaited} ({cause}); retry later", {"Retry-After": "5"})


async def _bug(_request: Request, _raised: Exception) -> JSONResponse:
    return _error(500, "the request triggered a bug in the cloud; see its log")  # the server logs the traceback


def _error(status: int, message: str, headers: Mapping[str, Any] | None = None) -> JSONResponse:
    return CleanJSON({"error": message}, status, dict(headers) if headers else None)
