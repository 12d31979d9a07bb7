"""Predictions on the device: the Open Inference Protocol (v2) over REST, in the agent's event loop.

Any client of Triton or KServe can ask. Loopback by default. A quick model runs right here; a slower one
in a worker thread, so that the loop keeps turning (ONNX Runtime computes outside the GIL).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from edge_agent.sessions import Models, Served
from edgefl import __version__
from edgefl.errors import ConfigError, ProtocolError
from edgefl.protocols.addresses import bracketed

MAX_BODY_BYTES = 64 << 20
MAX_CONNECTIONS = 256
NUM_WORKERS = 2
SHUTDOWN_S = 5


def bind(host: str, port: int) -> socket.socket:
    """Take the port to serve on (0 = any that is free); raises ConfigError where it is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as cause:
        listener.close()
        raise ConfigError(
            f"cannot serve on {host}:{port}: {cause.strerror}. Choose another --serve-port, or 0 for any that is free"
        ) from cause
    return listener


def url_of(listener: socket.socket) -> str:
    """Return where clients reach a listener."""
    host, port = listener.getsockname()[:2]
    return f"http://{bracketed(host)}:{port}"


class Serving:
    """The HTTP server over the models that serve."""

    def __init__(self, models: Models, listener: socket.socket) -> None:
        self._models, self._listener = models, listener
        self._workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="inference")
        self.ready = False  # set once the releases that the device holds are loaded

    async def run(self) -> None:
        """Serve until cancelled; requests that have begun are answered."""
        config = uvicorn.Config(
            self.app(), lifespan="off", ws="none", log_config=None, log_level="warning", access_log=False,
            limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=SHUTDOWN_S,
        )  # fmt: skip
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[self._listener]), name="uvicorn")
        try:
            await asyncio.shield(task)
        finally:
            server.should_exit = True
            await asyncio.wait([task], timeout=2 * SHUTDOWN_S)
            self._workers.shutdown(wait=False, cancel_futures=True)
            self._listener.close()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        model = "/v2/models/{name}"
        versioned = f"{model}/versions/{{version}}"
        routes = [
            Route("/v2", self._server_metadata),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
        ]
        for path in (model, versioned):
            routes += [
                Route(path, self._model_metadata),
                Route(f"{path}/ready", self._model_ready),
                Route(f"{path}/infer", self._infer, methods=["POST"]),
            ]
        handlers: dict[Any, Any] = {HTTPException: _http_error, ProtocolError: _bad_request}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _server_metadata(self, _request: HttpRequest) -> HttpResponse:
        return JSONResponse({"name": "edgefl", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def _live(self, _request: HttpRequest) -> HttpResponse:
        return JSONResponse({"live": True})

    async def _ready(self, _request: HttpRequest) -> HttpResponse:
        return JSONResponse({"ready": self.ready}, 200 if self.ready else 503)

    async def _model_metadata(self, request: HttpRequest) -> HttpResponse:
        served = self._find(request)
        return JSONResponse(
            {
                "name": served.name,
                "versions": [str(served.version)],
                "platform": "onnxruntime_onnx",
                "inputs": [one.as_json() for one in served.inputs],
                "outputs": [one.as_json() for one in served.outputs],
            }
        )

    async def _model_ready(self, request: HttpRequest) -> HttpResponse:
        return JSONResponse({"name": self._find(request).name, "ready": True})

    async def _infer(self, request: HttpRequest) -> HttpResponse:
        from edge_agent.inference import HEADER_LENGTH, encode_response, parse_request

        served = self._find(request)
        body = await _body(request)
        parsed = parse_request(served, body, request.headers.get(HEADER_LENGTH))
        if served.inline:
            results = served.run(tuple(parsed.outputs), parsed.feeds)
        else:
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._workers, served.run, tuple(parsed.outputs), parsed.feeds)
        response = encode_response(served, parsed, results)
        return HttpResponse(response.body, headers=response.headers)

    def _find(self, request: HttpRequest) -> Served:
        name, version = request.path_params["name"], request.path_params.get("version")
        served = self._models.get(name)
        if served is None:
            if not self.ready:
                raise HTTPException(503, f"model {name!r} may still be loading; ask again")
            raise HTTPException(404, f"model {name!r} is not on this device; it serves: {self._names()}")
        if version is not None and version != str(served.version):
            raise HTTPException(404, f"model {name!r} has version {served.version} here, not {version!r}")
        return served

    def _names(self) -> str:
        return ", ".join(sorted(self._models.versions())) or "none"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the agent has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _body(request: HttpRequest) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise ProtocolError(f"the request is compressed ({encoding}); send it as it is")
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request has more than {MAX_BODY_BYTES} bytes")
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _http_error(_request: HttpRequest, error: HTTPException) -> HttpResponse:
    return _error(error.status_code, error.detail, error.headers)


async def _bad_request(_request: HttpRequest, error: ProtocolError) -> HttpResponse:
    return _error(400, str(error))


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> HttpResponse:
    return JSONResponse({"error": text}, status, headers=headers)
