"""Predictions on the device: the Open Inference Protocol (v2) over REST.

Clients of Triton and KServe work unchanged. It runs in the serving process (`edge_agent.serving.serving_main`), never
in the agent. Fast models run in the event loop; slow models, large requests and large responses are handled in worker
threads, so that `live` is answered in the meantime (ONNX Runtime releases the GIL).
Invariant: every response is the protocol's JSON or binary data; 4xx means that the client has to change the request.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from edge_agent.generation.api_error import ApiError
from edge_agent.generation.proxy import GenerationProxy, send_error
from edge_agent.placement.stats import stats_of
from edge_agent.serving.asgi import App, HttpError, Receive, Scope, Send, allow, handle_other_scope
from edge_agent.serving.board import Board
from edge_agent.sessions import Cancellation, LoadedModel, Models
from edgefl.errors import ProtocolError
from edgefl.process.version import __version__
from edgefl.protocols.addresses import bracketed
from edgefl.protocols.ports.listener import listen

if TYPE_CHECKING:
    from edge_agent.placement.placed_model import PlacedModel
    from edge_agent.serving.inference import InferenceRequest, InferenceResponse

MAX_BODY_BYTES = 64 << 20
MAX_RECEIVED_BYTES = 4 * MAX_BODY_BYTES  # of all bodies being received
MAX_WAITING = 64  # requests waiting for a worker
NUM_WORKERS = 2
BODY_S = 30.0  # time limit to receive a body
REQUEST_S = 60.0  # time limit for a prediction; then it is cancelled
STOP_S = 5.0  # for a cancelled computation to stop; otherwise it is stuck in a kernel
RETRY_AFTER_S = 1

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _HttpResponse:
    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)


def bind(host: str, port: int) -> socket.socket:
    """Listen on the serving port (0 = any free port); raises ConfigError if it is not available.

    Clients that connect before the server runs wait instead of being refused.
    """
    return listen(host, port, "--serve-port", "--serve-host")


def url_of(listener: socket.socket, *, secure: bool = False) -> str:
    """Return the URL of a listener."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if secure else 'http'}://{bracketed(host)}:{port}"


class Serving:
    """The HTTP server of predictions."""

    def __init__(self, models: Models, listener: socket.socket, board: Board | None = None) -> None:
        self._models, self._listener = models, listener
        self._board = board or Board()
        self._lanes = threading.local()  # each worker's lane of the board; lane 0 is the event loop's
        lanes = itertools.count(1)
        self._workers = ThreadPoolExecutor(
            NUM_WORKERS, "inference", initializer=lambda: setattr(self._lanes, "number", next(lanes))
        )
        self.placed: dict[str, PlacedModel] = {}  # those that are shared with a stage server, by name
        self._waiting = self._received = 0
        self.token = ""  # that clients must send; empty = none
        self.context: Callable[[], ssl.SSLContext] | None = None  # for each new connection; None = no TLS
        self.generation = GenerationProxy("")  # the way to the process that generates texts; here: there is none
        self.ready = False  # true once the installed releases are loaded
        self._disconnect_clients: Callable[[], None] = lambda: None  # not serving yet
        self.on_stuck: Callable[[str], None] = lambda model: None  # noqa: ARG005 - a computation cannot be stopped

    async def run(self) -> None:
        """Serve until cancelled; requests in progress are answered first."""
        from edge_agent.serving.http_server import make_server, serve
        from edge_agent.serving.request_cache import RequestCache

        server = make_server(self.app(), self.context)
        server.fast_path = RequestCache(self._models.get, self._run, self._allows)
        self._disconnect_clients = server.disconnect_clients
        try:
            await serve(server, self._listener)
        finally:
            self._workers.shutdown(wait=False, cancel_futures=True)
            self._listener.close()

    def disconnect_clients(self) -> None:
        """Make all clients reconnect, because access rights have changed."""
        self._disconnect_clients()

    def app(self) -> App:
        """Return the ASGI application."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # servers expect a function
            await self._call(scope, receive, send)

        return app

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await handle_other_scope(scope, receive, send)
            return
        if scope["path"].startswith("/v1/"):
            await self._generate(scope, receive, send)
            return
        try:
            answer = await self._answer(scope, receive)
        except HttpError as error:
            answer = _error(error.status, str(error), *error.headers)
        except ProtocolError as error:
            answer = _error(400, str(error))
        except MemoryError:
            answer = _error(503, "this request needs more memory than predictions may use here; send fewer rows")
        except Exception:
            await _reply(scope, send, _error(500, "internal error of this server; see its log"))
            raise  # the server logs it
        await _reply(scope, send, answer)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request of OpenAI's API answered by the generation process; errors are in its form."""
        try:
            if self.token:
                self._check_token(scope)
            body, _ = await self._body(scope, receive)
        except (HttpError, ProtocolError) as error:
            await send_error(send, ApiError(error.status if isinstance(error, HttpError) else 400, str(error)))
            return
        await self.generation.forward(scope["method"], scope["path"], body, send, receive)

    async def _answer(self, scope: Scope, receive: Receive) -> _HttpResponse:
        if self.token and not scope["path"].startswith("/v2/health/"):  # health checks send no token
            self._check_token(scope)
        match [part for part in scope["path"].split("/") if part]:
            case ["v2", "models", name, "infer"]:
                return await self._infer(scope, receive, name, None)
            case ["v2", "models", name, "versions", version, "infer"]:
                return await self._infer(scope, receive, name, version)
            case rest:
                allow(scope, b"GET, HEAD", "GET", "HEAD", known=_is_known(rest))
                return self._get(rest)

    def _allows(self, scope: Mapping[str, Any]) -> bool:
        """Whether a request has the token, if one is required."""
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return not self.token or hmac.compare_digest(sent, b"Bearer " + self.token.encode())

    def _check_token(self, scope: Scope) -> None:
        if not self._allows(scope):
            raise HttpError(401, "send the token of this device: `Authorization: Bearer …`", _CHALLENGE)

    def _get(self, path: list[str]) -> _HttpResponse:
        """Answer a GET request."""
        match path[1:]:
            case []:
                return _json({"name": "edgefl", "version": __version__, "extensions": ["binary_tensor_data"]})
            case ["health", "live"]:
                return _json({"live": True})
            case ["health", "ready"]:
                return _json({"ready": self.ready}, 200 if self.ready else 503)
            case ["models", name, "stats"]:
                return _json(stats_of(self._find_placed(name)))
        served = self._find(path[2], path[4] if path[3:4] == ["versions"] else None)
        return _json({"name": served.name, "ready": True}) if path[-1] == "ready" and len(path) > 3 else _about(served)

    async def _infer(self, scope: Scope, receive: Receive, name: str, version: str | None) -> _HttpResponse:
        from edge_agent.serving.inference import encode_response, is_small_request, is_small_response, parse_request

        allow(scope, b"POST", "POST", known=True)
        served = self._find(name, version)
        body, length = await self._body(scope, receive)
        if not isinstance(served, LoadedModel):
            return _sent(await self._infer_placed(served, body, length))
        if not is_small_request(body, length):
            return _sent(await self._in_thread(partial(self._parse_and_run, served, body, length), served))
        request = parse_request(served, body, length)
        if not served.runs_inline(request.feeds):
            return _sent(await self._in_thread(partial(self._run_and_encode, served, request), served))
        results = self._run(served, request)
        if is_small_response(request, results):
            return _sent(encode_response(served, request, results))
        return _sent(await self._in_thread(lambda _cancellation: encode_response(served, request, results), served))

    async def _infer_placed(self, served: PlacedModel, body: bytes, length: str | None) -> InferenceResponse:
        from edge_agent.placement.placed_model import Unanswered
        from edge_agent.serving.inference import encode_response, is_small_request, is_small_response, parse_request

        if is_small_request(body, length):
            request = parse_request(served, body, length)
        else:
            request = await self._in_thread(lambda _: parse_request(served, body, length), served)
        try:
            found = await served.infer(tuple(request.outputs), request.feeds, request.timeout_s, self.compute)
        except Unanswered as refused:
            raise HttpError(503, str(refused), _retry()) from refused
        if is_small_response(request, found.results):
            return encode_response(served, request, found.results, found.parameters)
        return await self._in_thread(
            lambda _: encode_response(served, request, found.results, found.parameters), served
        )  # fmt: skip

    async def compute(self, model: LoadedModel, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run a part of a placed model: in the event loop if it is fast, else in a worker thread."""
        if model.runs_inline(feeds):
            return self._run_part(model, names, feeds, None)
        return await self._in_thread(lambda cancellation: self._run_part(model, names, feeds, cancellation), model)

    async def _in_thread(self, work: Callable[[Cancellation], _Result], served: LoadedModel | PlacedModel) -> _Result:
        if self._waiting >= MAX_WAITING:
            raise HttpError(503, f"{MAX_WAITING} predictions are waiting already; try again", _retry())
        cancellation = Cancellation()
        self._waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._workers, work, cancellation)
        done.add_done_callback(self._left)
        try:
            async with asyncio.timeout(REQUEST_S):
                return await asyncio.shield(done)
        except TimeoutError as cause:
            raise HttpError(504, f"the prediction took longer than {REQUEST_S:g} s; send fewer rows") from cause
        finally:
            if not done.done():
                cancellation.cancel()
                asyncio.get_running_loop().call_later(STOP_S, self._check_stopped, done, served.name)

    def _parse_and_run(
        self, served: LoadedModel, body: bytes, length: str | None, cancellation: Cancellation
    ) -> InferenceResponse:
        from edge_agent.serving.inference import parse_request

        return self._run_and_encode(served, parse_request(served, body, length), cancellation)

    def _run_and_encode(
        self, served: LoadedModel, request: InferenceRequest, cancellation: Cancellation
    ) -> InferenceResponse:
        from edge_agent.serving.inference import encode_response

        return encode_response(served, request, self._run(served, request, cancellation))

    def _run(
        self, served: LoadedModel, request: InferenceRequest, cancellation: Cancellation | None = None
    ) -> list[Any]:
        return self._run_part(served, tuple(request.outputs), request.feeds, cancellation)

    def _run_part(
        self, served: LoadedModel, names: Sequence[str], feeds: Mapping[str, Any], cancellation: Cancellation | None
    ) -> list[Any]:  # fmt: skip
        lane = 0 if cancellation is None else self._lanes.number
        self._board.enter(lane, served.label)
        try:
            return served.run(names, feeds, cancellation)
        finally:
            self._board.leave(lane)

    def _left(self, done: asyncio.Future[Any]) -> None:
        self._waiting -= 1
        if not done.cancelled():
            done.exception()  # mark it as retrieved, even if no caller is waiting

    def _check_stopped(self, done: asyncio.Future[Any], model: str) -> None:
        if not done.done():
            self.on_stuck(model)

    async def _body(self, scope: Scope, receive: Receive) -> tuple[bytes, str | None]:
        """Return the body and its header length; raises HttpError if it is too large or too slow."""
        header_length: str | None = None
        for name, value in scope["headers"]:
            if name == b"inference-header-content-length":
                header_length = value.decode("latin-1")
            elif name == b"content-encoding" and value != b"identity":
                raise ProtocolError(f"the request is compressed ({value[:40].decode('latin-1')}); send it uncompressed")
            elif name == b"content-length" and int(value[:18]) > MAX_BODY_BYTES:
                raise _too_large()
        message = await receive()
        if not message.get("more_body", False):
            if message["type"] == "http.disconnect":
                raise HttpError(400, "the client disconnected before its request was complete")
            body: bytes = message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                raise _too_large()
            return body, header_length
        return await self._long_body(message, receive), header_length

    async def _long_body(self, message: MutableMapping[str, Any], receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    if message["type"] == "http.disconnect":
                        raise HttpError(400, "the client disconnected before its request was complete")
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    self._received += len(part)
                    if size > MAX_BODY_BYTES:
                        raise _too_large()
                    if self._received > MAX_RECEIVED_BYTES:
                        raise HttpError(503, "too many large requests at once; try again", _CLOSE, _retry())
                    if not message.get("more_body", False):
                        return b"".join(parts)
                    message = await receive()
        except TimeoutError as cause:
            raise HttpError(408, f"the request was incomplete after {BODY_S:g} s", _CLOSE) from cause
        finally:
            self._received -= size

    def _find_placed(self, name: str) -> PlacedModel:
        if name not in self.placed:
            raise HttpError(404, f"model {name[:80]!r} has no statistics: it is not shared with a stage server here")
        return self.placed[name]

    def _find(self, name: str, version: str | None) -> LoadedModel | PlacedModel:
        served = self._models.get(name) or self.placed.get(name)
        if served is None:
            if not self.ready:
                raise HttpError(503, f"model {name[:80]!r} may still be loading; try again", _retry())
            raise HttpError(404, f"model {name[:80]!r} is not on this device; it serves: {self._names()}")
        if version is not None and version != str(served.version):
            raise HttpError(404, f"model {name!r} has version {served.version} here, not {version[:80]!r}")
        return served

    def _names(self) -> str:
        return ", ".join(sorted({*self._models.versions(), *self.placed})) or "none"


_CLOSE = (b"connection", b"close")
_CHALLENGE = (b"www-authenticate", b"Bearer")


async def _reply(scope: Scope, send: Send, answer: _HttpResponse) -> None:
    headers = [*answer.headers, (b"content-length", str(len(answer.body)).encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})


def _sent(response: InferenceResponse) -> _HttpResponse:
    headers = tuple([(name.lower().encode(), value.encode()) for name, value in response.headers.items()])
    return _HttpResponse(200, response.body, headers)


def _about(served: LoadedModel | PlacedModel) -> _HttpResponse:
    return _json(
        {
            "name": served.name,
            "versions": [str(served.version)],
            "platform": "onnxruntime_onnx",
            "inputs": [one.as_json() for one in served.inputs],
            "outputs": [one.as_json() for one in served.outputs],
        }
    )


def _is_known(path: list[str]) -> bool:
    match path:
        case ["v2"] | ["v2", "health", "live" | "ready"] | ["v2", "models", _] | ["v2", "models", _, "ready"]:
            return True
        case ["v2", "models", _, "stats"]:
            return True
        case ["v2", "models", _, "versions", _] | ["v2", "models", _, "versions", _, "ready"]:
            return True
        case _:
            return False


def _too_large() -> HttpError:
    return HttpError(413, f"the request has more than {MAX_BODY_BYTES} bytes", _CLOSE)


def _retry() -> tuple[bytes, bytes]:
    return b"retry-after", str(RETRY_AFTER_S).encode()


def _json(value: Mapping[str, object], status: int = 200) -> _HttpResponse:
    return _HttpResponse(status, json.dumps(value, separators=(",", ":")).encode())


def _error(status: int, text: str, *headers: tuple[bytes, bytes]) -> _HttpResponse:
    return _HttpResponse(
        status, json.dumps({"error": text}).encode(), ((b"content-type", b"application/json"), *headers)
    )
