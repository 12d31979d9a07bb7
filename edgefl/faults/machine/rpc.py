"""gRPC in a simulation: `grpc.aio` channels whose calls reach the real servicers through the simulated network.

The contract is that of grpc.aio: messages of a call arrive in order, a call ends once, a call whose connection is lost
ends UNAVAILABLE at the client and is cancelled at the server. Certificates are the real ones; TLS itself is left out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc.aio import Metadata

from edgefl.faults.machine.network import Network, Wire
from edgefl.faults.machine.rpc_server import OK, ServerCall
from edgefl.faults.machine.threads import kernel

_AIO: Any = grpc.aio  # its types lack some names
_RETRY_S = 0.2
_BACKOFF = 1.6
_LONGEST_S = 1.5
_States = grpc.ChannelConnectivity


class SimChannel:
    """`grpc.aio.Channel`."""

    def __init__(self, network: Network, target: str, certificate: bytes) -> None:
        node = kernel().node
        if node is None:
            raise RuntimeError("a channel is opened outside of a node")
        self.network, self.node, self.certificate = network, node, certificate
        self._port = int(target.rpartition(":")[2])
        self.connection: Wire | None = None
        self.server: Any = None
        self._state = _States.IDLE
        self._changed = asyncio.Event()
        self._wants = self._is_closed = False  # `_wants`: it connects, or waits before it tries again
        self._pause_s = _RETRY_S
        self.calls: list[SimCall] = []

    def unary_unary(self, path: str, to: Any, back: Any) -> Any:
        return self._method(path, to, back, streams_up=False, streams_down=False)

    def unary_stream(self, path: str, to: Any, back: Any) -> Any:
        return self._method(path, to, back, streams_up=False, streams_down=True)

    def stream_unary(self, path: str, to: Any, back: Any) -> Any:
        return self._method(path, to, back, streams_up=True, streams_down=False)

    def stream_stream(self, path: str, to: Any, back: Any) -> Any:
        return self._method(path, to, back, streams_up=True, streams_down=True)

    def _method(self, path: str, to: Any, back: Any, *, streams_up: bool, streams_down: bool) -> Any:
        def begin(request: Any = None, *, timeout: float | None = None, metadata: Any = (),
                  wait_for_ready: bool = False) -> SimCall:  # fmt: skip
            call = SimCall(self, path, back, to or bytes)
            call.streams_up, call.streams_down = streams_up, streams_down
            call.start(request, timeout, tuple(metadata), wait_for_ready=wait_for_ready)
            return call

        return begin

    def get_state(self, *, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        if try_to_connect:
            self.connect()
        return self._state

    async def wait_for_state_change(self, last: grpc.ChannelConnectivity) -> None:
        while self._state is last and not self._is_closed:
            await self._changed.wait()
        if self._is_closed:
            raise grpc.aio.UsageError("the channel is closed")

    async def close(self, _grace: float | None = None) -> None:
        self._is_closed = True
        for call in list(self.calls):
            call.cancel()
        if self.connection is not None:
            self.connection.reset(server_after_s=self.network.latency_s(*self.connection.ends))
            self.connection = None
        self._set(_States.SHUTDOWN)

    def connect(self) -> None:
        """Connect if there is no connection."""
        if self.connection is None and not self._wants and not self._is_closed:
            self._wants = True
            self._try()

    def _try(self) -> None:
        if not self._is_closed:
            self._set(_States.CONNECTING)
            self.network.connect("grpc", self.node, self._port, self._connected)

    def _connected(self, connection: Wire | None, server: Any) -> None:
        if self._is_closed:
            if connection is not None:
                connection.reset()
            return
        if connection is None:
            self._set(_States.TRANSIENT_FAILURE)
            pause_s, self._pause_s = self._pause_s, min(_LONGEST_S, self._pause_s * _BACKOFF)
            self.node.loop.call_later(pause_s, self._try)
            return
        self._pause_s, self._wants = _RETRY_S, False
        self.connection, self.server = connection, server
        connection.when_lost(lambda: self._lost(connection), at_server=False)
        self._set(_States.READY)

    def _lost(self, connection: Wire) -> None:
        if self.connection is connection:
            self.connection = None
            self._set(_States.IDLE)

    def _set(self, state: grpc.ChannelConnectivity) -> None:
        self._state = state
        self._changed.set()
        self._changed = asyncio.Event()

    async def ready(self, *, waits: bool) -> Wire | None:
        """Return the connection, or None for a call that does not wait and cannot have one."""
        while self.connection is None:
            if self._is_closed:
                return None
            failed = self._state is _States.TRANSIENT_FAILURE
            if failed and not waits:
                return None
            if not failed:
                self.connect()
            await self._changed.wait()
        return self.connection


class SimCall:
    """A call, as its client sees it."""

    def __init__(self, channel: SimChannel, path: str, back: Any, to: Any) -> None:
        self._channel, self.path, self._back, self._to = channel, path, back, to
        self.streams_up = self.streams_down = False
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._linked: asyncio.Future[None] = loop.create_future()  # it has a connection, or ended without one
        self._begun: asyncio.Future[None] = loop.create_future()  # the server's initial metadata
        self._initial: Metadata = Metadata()
        self._messages: deque[Any] = deque()
        self._news = asyncio.Event()
        self._status: tuple[grpc.StatusCode, str, tuple[Any, ...]] | None = None
        self._connection: Wire | None = None
        self._remote: ServerCall | None = None
        self._outgoing: list[tuple[str, Any]] = []  # before there is a connection
        self._tasks: list[asyncio.Task[None]] = []
        self._calls: list[Callable[[Any], object]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._forget: Callable[[], None] = lambda: None
        channel.calls.append(self)

    def start(self, request: Any, timeout: float | None, metadata: tuple[Any, ...], *, wait_for_ready: bool) -> None:
        loop = asyncio.get_running_loop()
        if timeout is not None:
            late = (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())
            self._timer = loop.call_later(timeout, self._cut, late)
        self._tasks.append(loop.create_task(self._open(metadata, waits=wait_for_ready)))
        if not self.streams_up:
            self._send("message", self._to(request))
            self._send("half_close", None)
        elif request is not None:
            self._tasks.append(loop.create_task(self._send_all(request)))

    async def _open(self, metadata: tuple[Any, ...], *, waits: bool) -> None:
        channel = self._channel
        connection = await channel.ready(waits=waits)
        if self.done():
            return
        if connection is None:
            self.end((grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses", ()))
            return
        self._connection = connection
        self._linked.set_result(None)
        self._forget = connection.when_lost(
            lambda: self.end((grpc.StatusCode.UNAVAILABLE, "Socket closed", ())), at_server=False
        )
        server = channel.server
        self._remote = remote = ServerCall(self, connection, server, metadata, channel.certificate)
        connection.to_server(remote.begin)
        waiting, self._outgoing = self._outgoing, []
        for kind, data in waiting:
            self._send(kind, data)

    async def _send_all(self, requests: AsyncIterator[Any]) -> None:
        async for one in requests:
            self._send("message", self._to(one))
            await asyncio.sleep(0)
        self._send("half_close", None)

    def _send(self, kind: str, data: Any) -> None:
        remote, connection = self._remote, self._connection
        if remote is None or connection is None:
            self._outgoing.append((kind, data))
        else:
            connection.to_server(lambda: remote.take(kind, data))

    # Called by the server's side, in the client's event loop.

    def begin(self, metadata: Metadata) -> None:
        self._initial = metadata
        if not self._begun.done():
            self._begun.set_result(None)

    def take(self, data: bytes) -> None:
        self.begin(self._initial)
        self._messages.append(data)
        self._news.set()

    def end(self, status: tuple[grpc.StatusCode, str, tuple[Any, ...]]) -> None:
        if self._status is None:
            self._status = status
            self.begin(self._initial)
            if not self._linked.done():
                self._linked.set_result(None)
            self._forget()
            if self._timer is not None:
                self._timer.cancel()
            self._ended.set_result(None)
            self._news.set()
            if self in self._channel.calls:
                self._channel.calls.remove(self)
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()
            for call in self._calls:
                call(self)

    # What grpc.aio's calls have.

    def done(self) -> bool:
        return self._status is not None

    def cancelled(self) -> bool:
        return self._status is not None and self._status[0] is grpc.StatusCode.CANCELLED and self._status[1] == _LOCAL

    def cancel(self) -> bool:
        if self.done():
            return False
        self._cut((grpc.StatusCode.CANCELLED, _LOCAL, ()))
        return True

    def _cut(self, status: tuple[grpc.StatusCode, str, tuple[Any, ...]]) -> None:
        remote = self._remote
        self.end(status)
        if remote is not None and self._connection is not None:
            self._connection.to_server(remote.cancel)

    def add_done_callback(self, call: Callable[[Any], object]) -> None:
        self._calls.append(call)

    async def code(self) -> grpc.StatusCode:
        await asyncio.shield(self._ended)
        return self._status[0] if self._status else OK

    async def wait_for_connection(self) -> None:
        await self._or_cancel(self._linked)
        self._raise()

    async def initial_metadata(self) -> Metadata:
        await self._or_cancel(self._begun)
        return self._initial

    async def _or_cancel(self, awaited: asyncio.Future[None]) -> None:
        try:
            await asyncio.shield(awaited)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _raise(self) -> None:
        if self._status is None or self._status[0] is OK:
            return
        if self.cancelled():
            raise asyncio.CancelledError
        code, details, trailing = self._status
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details, None)

    async def _result(self) -> Any:
        await self._or_cancel(self._ended)
        self._raise()
        return self._decoded(self._messages[0])

    def _decoded(self, data: bytes) -> Any:
        return data if self._back is None else self._back(data)

    def __await__(self) -> Any:
        return self._result().__await__()

    async def read(self) -> Any:
        while not self._messages:
            if self.done():
                self._raise()
                return _AIO.EOF
            self._news.clear()
            try:
                await self._news.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self._decoded(self._messages.popleft())

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not _AIO.EOF:
            yield message

    async def write(self, message: Any) -> None:
        if self.done():
            self._refuse_ended()
        self._send("message", self._to(message))
        await asyncio.sleep(0)
        if self.done():
            self._refuse_ended()

    def _refuse_ended(self) -> None:
        self._raise()
        raise asyncio.InvalidStateError("RPC already finished.")

    async def done_writing(self) -> None:
        if not self.done():
            self._send("half_close", None)
        await asyncio.sleep(0)


_LOCAL = "Locally cancelled by application!"


class SimAio:
    """The module `grpc.aio` with channels of the simulation."""

    def __init__(self, network: Callable[[], Network]) -> None:
        self._network = network

    def secure_channel(self, target: str, credentials: bytes, options: Any = ()) -> SimChannel:  # noqa: ARG002
        return SimChannel(self._network(), target, credentials)

    def __getattr__(self, name: str) -> Any:
        return getattr(grpc.aio, name)


class SimGrpc:
    """The module `grpc` with channels of the simulation."""

    def __init__(self, network: Callable[[], Network]) -> None:
        self.aio = SimAio(network)

    def __getattr__(self, name: str) -> Any:
        return getattr(grpc, name)
