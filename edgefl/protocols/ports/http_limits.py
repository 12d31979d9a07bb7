"""uvicorn with limits: a client that sends half a request, or nothing, harms no other client.

Three parts, for all our HTTP ports. `LimitedServer` accepts with a `Listener`, so that connections are
counted before TLS. Its protocol has deadlines for headers, bodies and reading of answers; a connection
that we wait for can be closed to make room, one with a running request cannot. `RequestLimit` is ASGI
middleware that limits running requests, not connections, and reserves places for known clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgefl.errors import PartFailed
from edgefl.protocols.ports.connections import Connection, ConnectionLimits, Connections
from edgefl.protocols.ports.listener import Listener, Port
from edgefl.protocols.ports.transports import abort

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _HttpProtocol  # the httptools version has the same names
else:
    _HttpProtocol = asyncio.Protocol

PLACE = "edgefl.place"  # key in the `state` of a request's scope: its Connection
RETRY_AFTER_S = 2
LAST_WORDS_S = 0.05  # time to send an answer before its connection is closed


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpLimits:
    """Limits for the clients of an HTTP port. A missed deadline closes the connection."""

    max_connections: int = 1000
    max_waiting: int = 256  # connections without a complete request
    headers_s: float = 10.0  # for TLS and a request's headers
    idle_s: float = 30.0  # between requests
    body_s: float = 20.0  # for a body, plus its size / `body_bytes_per_s`
    body_bytes_per_s: int = 1024  # the lowest rate of a body
    reader_s: float = 60.0  # for a client to read a part of an answer

    def connections(self) -> ConnectionLimits:
        return ConnectionLimits(
            max_open=self.max_connections,
            max_waiting=min(self.max_waiting, self.max_connections),
            waiting_s=self.headers_s,
        )


HeadersAndBody = tuple[Sequence[tuple[bytes, bytes]], bytes]  # of a 200; without content-length


class FastPath(Protocol):
    """Responds to complete requests before HTTP is parsed, if they arrive in one read, between requests."""

    def respond(self, data: bytes) -> HeadersAndBody | None:
        """Return the response to a complete request; None if the request has to be parsed."""

    def add(self, data: bytes, scope: Mapping[str, Any]) -> None:
        """Called with each complete request that was parsed."""


class LimitedServer(uvicorn.Server):
    """A uvicorn server on one listening socket, with limits. It does not handle signals."""

    def __init__(
        self, config: uvicorn.Config, limits: HttpLimits, name: str,
        context: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._limits, self._name, self._context = limits, name, context  # context: called per connection; None = no TLS
        self.servers: Any = []
        self._protocol_class: Any = None
        self.held: Connections | None = None  # set when it serves
        self.fast_path: FastPath | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the one socket given."""
        if not sockets:
            raise ValueError("a LimitedServer needs its socket: serve(sockets=[...])")
        await self.lifespan.startup()
        base = self.config.http_protocol_class  # h11's or httptools'
        self._protocol_class = type(f"Limited{base.__name__}", (LimitedProtocol, base), {})
        self.held = Connections(self._limits.connections(), asyncio.get_running_loop().time)
        port = Port(name=self._name, socket=sockets[0], context=self._context)
        listener = Listener(port, self.held, self._make_protocol)
        listener.start()
        self.servers = [listener]
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """Check that connections are still accepted; raises PartFailed if they are not."""
        for task in self.servers[0].tasks:
            if task.done() and not self.should_exit:
                fault = None if task.cancelled() else task.exception()
                raise PartFailed(f"{self._name}: connections are not accepted any more: {fault!r}") from fault
        return await super().on_tick(counter)

    def disconnect_clients(self) -> None:
        """Make every client reconnect: idle connections are closed now, others after their current answer."""
        for one in list(self.server_state.connections):
            one.shutdown()

    def abort_all(self) -> None:
        """Close the remaining connections after a stop."""
        for one in list(self.server_state.connections):
            abort(one.transport)

    def _make_protocol(self, place: Connection) -> asyncio.Protocol:
        state = {**self.lifespan.state, PLACE: place}
        protocol: LimitedProtocol = self._protocol_class(
            config=self.config, server_state=self.server_state, app_state=state
        )
        protocol.take_place(place, self._limits)
        protocol.fast_path = self.fast_path
        return protocol


class LimitedProtocol(_HttpProtocol):
    """Deadlines for one connection. Mixed into uvicorn's protocol, h11's or httptools'."""

    _place: Connection
    _limits: HttpLimits
    _asked = False  # the next request has begun to arrive
    _body_began_s = 0.0  # 0 = the headers are not complete
    _body_bytes = 0
    _stalled: asyncio.TimerHandle | None = None
    fast_path: FastPath | None = None

    def take_place(self, place: Connection, limits: HttpLimits) -> None:
        """Set this connection's place. Called once, before anything else."""
        self._place, self._limits = place, limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._place.close = self._close_for
        self._place.wait(self._limits.headers_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._place.leave()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        fast_path = self.fast_path if self._is_between_requests() else None
        if fast_path is not None and (response := fast_path.respond(data)) is not None:
            self._write_answer(*response)
            return
        super().data_received(data)
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            if not self._asked:
                self._asked = True
                self._place.wait(self._limits.headers_s)
        elif cycle.more_body:
            self._take_body(len(data))
        else:
            self._place.serve()
            if fast_path is not None:
                fast_path.add(data, self.scope)

    def on_response_complete(self) -> None:
        self._asked, self._body_began_s, self._body_bytes = False, 0.0, 0
        self._place.wait(self._limits.idle_s)
        super().on_response_complete()
        if not self.cycle.response_complete and not self.cycle.more_body:  # the next request is already here
            self._place.serve()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._limits.reader_s, abort, self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with JSON, too."""
        self._say_and_close(400, msg)

    def _is_between_requests(self) -> bool:
        cycle = self.cycle
        return not (
            self._asked
            or (cycle is not None and (cycle.more_body or not cycle.response_complete))
            or self.flow.write_paused
            or self.transport.is_closing()
        )

    def _write_answer(self, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """Answer as uvicorn does, whose time for idle connections begins again."""
        self._unset_keepalive_if_required()
        lines = [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *headers)]
        self.transport.write(b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n" % (b"".join(lines), len(body)))
        self.transport.write(body)
        self._place.wait(self._limits.idle_s)
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _take_body(self, num_bytes: int) -> None:
        now_s = self.loop.time()
        if not self._body_began_s:
            self._body_began_s = now_s
            self._place.wait(self._limits.body_s)
        self._body_bytes += num_bytes
        due_s = self._limits.body_s + self._body_bytes / self._limits.body_bytes_per_s
        self._place.deadline_s = self._body_began_s + due_s

    def _close_for(self, reason: str) -> None:
        cycle = self.cycle
        answered = cycle is not None and cycle.response_started and not cycle.response_complete
        if (self._asked or self._body_began_s) and not answered and not self.transport.is_closing():
            self._say_and_close(408, f"the request is not complete, and {reason}; send it again")
        else:
            abort(self.transport)

    def _say_and_close(self, status: int, text: str) -> None:
        body = json.dumps({"error": text}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.loop.call_later(LAST_WORDS_S, abort, self.transport)


class RequestLimit:
    """ASGI middleware: at most `max_active` running requests, `reserved` of them for known clients.

    Others get 503 with Retry-After. A request counts from when its body is complete. A request of a client
    that `vouches` accepts keeps its connection, however slowly its body arrives.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_active: int,
        reserved: int = 0,
        vouches: Callable[[Scope], bool] = lambda _scope: False,
    ) -> None:
        self._app, self._vouches = app, vouches
        self._max_known, self._max_others = max_active, max_active - reserved
        self._active: set[_Request] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        known = self._vouches(scope)
        place: Connection | None = scope.get("state", {}).get(PLACE)
        if known and place is not None:
            place.serve()
        request = _Request(self._active, self._max_known if known else self._max_others, receive)
        try:
            if not has_body(scope):
                request.begin()
            with contextlib.suppress(ClientDisconnect):  # the client is gone
                await self._app(scope, request.receive, send)
        except _Busy as busy:
            await _refuse(send, str(busy))
        finally:
            request.end()


class _Busy(HTTPException):
    """Too many requests are running. Inside an application, its own handler answers."""

    def __init__(self, num_active: int) -> None:
        text = f"{num_active} requests are running, which is the limit; try again in {RETRY_AFTER_S} s"
        super().__init__(503, text, {"Retry-After": str(RETRY_AFTER_S)})

    def __str__(self) -> str:
        return str(self.detail)


class _Request:
    """One request; it is active from when its body is complete."""

    def __init__(self, active: set[_Request], most: int, receive: Receive) -> None:
        self._active, self._most, self._receive = active, most, receive

    def begin(self) -> None:
        if self not in self._active and len(self._active) >= self._most:
            raise _Busy(len(self._active))
        self._active.add(self)

    def end(self) -> None:
        self._active.discard(self)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self.begin()
        return message


def has_body(scope: Scope) -> bool:
    """Whether a request announces a body."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in scope["headers"]
    )


async def _refuse(send: Send, text: str) -> None:
    body = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"retry-after", str(RETRY_AFTER_S).encode()), (b"connection", b"close")]  # fmt: skip
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
