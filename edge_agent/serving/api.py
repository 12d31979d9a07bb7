"""Predictions on the device: the Open Inference Protocol (v2) over REST.

Any client of Triton or KServe can ask. It runs in the serving process (`edge_agent.serving.serving_main`), never in
the agent. A quick model runs in the event loop; a slower one, a large body and a large answer in a worker
thread, so that `live` is answered meanwhile (ONNX Runtime computes outside the interpreter's lock).
Invariant: every answer is the protocol's JSON or binary data; 4xx where the client has to change something.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from edge_agent.serving.board import Board
from edge_agent.sessions import Models, Served, Stop
from edgefl.errors import ProtocolError
from edgefl.process.version import __version__
from edgefl.protocols.addresses import bracketed
from edgefl.protocols.ports.listener import listen

if TYPE_CHECKING:
    from edge_agent.serving.inference import Request, Response

MAX_BODY_BYTES = 64 << 20
MAX_RECEIVED_BYTES = 4 * MAX_BODY_BYTES  # of all bodies that are being received
MAX_WAITING = 64  # requests that wait for a worker
NUM_WORKERS = 2
BODY_S = 30.0  # for a body to arrive
REQUEST_S = 60.0  # for a prediction; then the computation is stopped
STOP_S = 5.0  # for a stopped computation to end; one that does not is stuck in a kernel
RETRY_AFTER_S = 1

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _HttpResponse:
    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)


class _Refused(Exception):
    """The request is answered with an error; ends the work on it."""

    def __init__(self, status: int, reason: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


def bind(host: str, port: int) -> socket.socket:
    """Take the port to serve on (0 = any that is free); raises ConfigError where it cannot be had."""
    # Who connects before the first answer waits, instead of being refused.
    return listen(host, port, "--serve-port", "--serve-host")


def url_of(listener: socket.socket, *, secure: bool = False) -> str:
    """Return where clients reach a listener."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if secure else 'http'}://{bracketed(host)}:{port}"


class Serving:
    """The HTTP server over the models that serve."""

    def __init__(self, models: Models, listener: socket.socket, board: Board | None = None) -> None:
        self._models, self._listener = models, listener
        self._board = board or Board()
        self._lanes = threading.local()  # of the board: the event loop's is 0
        lanes = itertools.count(1)
        self._workers = ThreadPoolExecutor(
            NUM_WORKERS, "inference", initializer=lambda: setattr(self._lanes, "number", next(lanes))
        )
        self._waiting = self._received = 0
        self.token = ""  # that clients have to send; empty = none
        self.context: Callable[[], ssl.SSLContext] | None = None  # gives that of a connection; None = plain
        self.ready = False  # set once the releases that the device holds are loaded
        self._part_with_clients: Callable[[], None] = lambda: None  # before it serves there are none
        self.on_stuck: Callable[[str], None] = lambda model: None  # noqa: ARG005 - a computation cannot be stopped

    async def run(self) -> None:
        """Serve until cancelled; requests that have begun are answered."""
        from edge_agent.serving.http_server import make_server, serve
        from edge_agent.serving.known_requests import KnownRequests

        server = make_server(self.app(), self.context)
        server.shortcut = KnownRequests(self._models.get, self._run, self._allows)
        self._part_with_clients = server.part_with_clients
        try:
            await serve(server, self._listener)
        finally:
            self._workers.shutdown(wait=False, cancel_futures=True)
            self._listener.close()

    def part_with_clients(self) -> None:
        """Have every client connect anew, since who may ask has changed."""
        self._part_with_clients()

    def app(self) -> App:
        """Return the ASGI application."""

        async def app(scope: _Scope, receive: _Receive, send: _Send) -> None:  # servers look for a function
            await self._call(scope, receive, send)

        return app

    async def _call(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await _greet(scope, receive, send)
            return
        try:
            answer = await self._answer(scope, receive)
        except _Refused as refused:
            answer = _error(refused.status, str(refused), *refused.headers)
        except ProtocolError as error:
            answer = _error(400, str(error))
        except MemoryError:
            answer = _error(503, "this request needs more memory than predictions may use here; send fewer rows")
        except Exception:
            await _reply(scope, send, _error(500, "a fault of this server; its log says more"))
            raise  # the server logs it
        await _reply(scope, send, answer)

    async def _answer(self, scope: _Scope, receive: _Receive) -> _HttpResponse:
        if self.token and not scope["path"].startswith("/v2/health/"):  # those who only watch have no token
            self._check_token(scope)
        match [part for part in scope["path"].split("/") if part]:
            case ["v2", "models", name, "infer"]:
                return await self._infer(scope, receive, name, None)
            case ["v2", "models", name, "versions", version, "infer"]:
                return await self._infer(scope, receive, name, version)
            case rest:
                _allow(scope, b"GET, HEAD", "GET", "HEAD", known=_is_known(rest))
                return self._look(rest)

    def _allows(self, scope: Mapping[str, Any]) -> bool:
        """Whether a request comes with the token, where one is wanted."""
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return not self.token or hmac.compare_digest(sent, b"Bearer " + self.token.encode())

    def _check_token(self, scope: _Scope) -> None:
        if not self._allows(scope):
            raise _Refused(401, "send the token of this device: `Authorization: Bearer …`", _CHALLENGE)

    def _look(self, path: list[str]) -> _HttpResponse:
        """Answer what needs no computation."""
        match path[1:]:
            case []:
                return _json({"name": "edgefl", "version": __version__, "extensions": ["binary_tensor_data"]})
            case ["health", "live"]:
                return _json({"live": True})
            case ["health", "ready"]:
                return _json({"ready": self.ready}, 200 if self.ready else 503)
        served = self._find(path[2], path[4] if path[3:4] == ["versions"] else None)
        return _json({"name": served.name, "ready": True}) if path[-1] == "ready" and len(path) > 3 else _about(served)

    async def _infer(self, scope: _Scope, receive: _Receive, name: str, version: str | None) -> _HttpResponse:
        from edge_agent.serving.inference import answers_at_once, encode_response, is_small, parse_request

        _allow(scope, b"POST", "POST", known=True)
        served = self._find(name, version)
        body, length = await self._body(scope, receive)
        if not is_small(body, length):
            return _sent(await self._in_thread(partial(self._all, served, body, length), served))
        request = parse_request(served, body, length)
        if not served.is_quick(request.feeds):
            return _sent(await self._in_thread(partial(self._rest, served, request), served))
        results = self._run(served, request)
        if answers_at_once(request, results):
            return _sent(encode_response(served, request, results))
        return _sent(await self._in_thread(lambda _stop: encode_response(served, request, results), served))

    async def _in_thread(self, work: Callable[[Stop], Response], served: Served) -> Response:
        if self._waiting >= MAX_WAITING:
            raise _Refused(503, f"{MAX_WAITING} predictions wait already; ask again", _retry())
        stop = Stop()
        self._waiting += 1
        done = asyncio.get_running_loop().run_in_executor(self._workers, work, stop)
        done.add_done_callback(self._left)
        try:
            async with asyncio.timeout(REQUEST_S):
                return await asyncio.shield(done)
        except TimeoutError as cause:
            raise _Refused(504, f"the prediction took longer than {REQUEST_S:g} s; send fewer rows") from cause
        finally:
            if not done.done():
                stop.set()
                asyncio.get_running_loop().call_later(STOP_S, self._check_stopped, done, served.name)

    def _all(self, served: Served, body: bytes, length: str | None, stop: Stop) -> Response:
        from edge_agent.serving.inference import parse_request

        return self._rest(served, parse_request(served, body, length), stop)

    def _rest(self, served: Served, request: Request, stop: Stop) -> Response:
        from edge_agent.serving.inference import encode_response

        return encode_response(served, request, self._run(served, request, stop))

    def _run(self, served: Served, request: Request, stop: Stop | None = None) -> list[Any]:
        lane = 0 if stop is None else self._lanes.number
        self._board.enter(lane, served.label)
        try:
            return served.run(tuple(request.outputs), request.feeds, stop)
        finally:
            self._board.leave(lane)

    def _left(self, done: asyncio.Future[Response]) -> None:
        self._waiting -= 1
        if not done.cancelled():
            done.exception()  # told to whoever still waits; nobody else wants it

    def _check_stopped(self, done: asyncio.Future[Response], model: str) -> None:
        if not done.done():
            self.on_stuck(model)

    async def _body(self, scope: _Scope, receive: _Receive) -> tuple[bytes, str | None]:
        """Return the body and its header length; raises _Refused for one that is too large, or late."""
        header_length: str | None = None
        for name, value in scope["headers"]:
            if name == b"inference-header-content-length":
                header_length = value.decode("latin-1")
            elif name == b"content-encoding" and value != b"identity":
                raise ProtocolError(f"the request is compressed ({value[:40].decode('latin-1')}); send it as it is")
            elif name == b"content-length" and int(value[:18]) > MAX_BODY_BYTES:
                raise _too_large()
        message = await receive()
        if not message.get("more_body", False):
            if message["type"] == "http.disconnect":
                raise _Refused(400, "the client went before its request was whole")
            body: bytes = message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                raise _too_large()
            return body, header_length
        return await self._long_body(message, receive), header_length

    async def _long_body(self, message: MutableMapping[str, Any], receive: _Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    if message["type"] == "http.disconnect":
                        raise _Refused(400, "the client went before its request was whole")
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    self._received += len(part)
                    if size > MAX_BODY_BYTES:
                        raise _too_large()
                    if self._received > MAX_RECEIVED_BYTES:
                        raise _Refused(503, "too many large requests arrive at once; ask again", _CLOSE, _retry())
                    if not message.get("more_body", False):
                        return b"".join(parts)
                    message = await receive()
        except TimeoutError as cause:
            raise _Refused(408, f"the request was not whole within {BODY_S:g} s", _CLOSE) from cause
        finally:
            self._received -= size

    def _find(self, name: str, version: str | None) -> Served:
        served = self._models.get(name)
        if served is None:
            if not self.ready:
                raise _Refused(503, f"model {name[:80]!r} may still be loading; ask again", _retry())
            raise _Refused(404, f"model {name[:80]!r} is not on this device; it serves: {self._names()}")
        if version is not None and version != str(served.version):
            raise _Refused(404, f"model {name!r} has version {served.version} here, not {version[:80]!r}")
        return served

    def _names(self) -> str:
        return ", ".join(sorted(self._models.versions())) or "none"


_CLOSE = (b"connection", b"close")
_CHALLENGE = (b"www-authenticate", b"Bearer")


async def _reply(scope: _Scope, send: _Send, answer: _HttpResponse) -> None:
    headers = [*answer.headers, (b"content-length", str(len(answer.body)).encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})


def _sent(response: Response) -> _HttpResponse:
    headers = tuple([(name.lower().encode(), value.encode()) for name, value in response.headers.items()])
    return _HttpResponse(200, response.body, headers)


def _about(served: Served) -> _HttpResponse:
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
        case ["v2", "models", _, "versions", _] | ["v2", "models", _, "versions", _, "ready"]:
            return True
        case _:
            return False


def _allow(scope: _Scope, allowed: bytes, *methods: str, known: bool) -> None:
    if not known:
        raise _Refused(404, "Not Found")
    if scope["method"] not in methods:
        raise _Refused(405, "Method Not Allowed", (b"allow", allowed))


def _too_large() -> _Refused:
    return _Refused(413, f"the request has more than {MAX_BODY_BYTES} bytes", _CLOSE)


def _retry() -> tuple[bytes, bytes]:
    return b"retry-after", str(RETRY_AFTER_S).encode()


def _json(value: Mapping[str, object], status: int = 200) -> _HttpResponse:
    return _HttpResponse(status, json.dumps(value, separators=(",", ":")).encode())


def _error(status: int, text: str, *headers: tuple[bytes, bytes]) -> _HttpResponse:
    return _HttpResponse(
        status, json.dumps({"error": text}).encode(), ((b"content-type", b"application/json"), *headers)
    )


async def _greet(scope: _Scope, receive: _Receive, send: _Send) -> None:
    """Answer what is no request: the server's start and end, and web sockets, which the protocol has not."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
