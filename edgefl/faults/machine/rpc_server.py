"""The server's side of gRPC in a simulation: calls that arrive by a wire, and the real handlers that answer them.

A call whose connection is lost, or that its client cancels, is cancelled here, too; `rpc.py` has the client's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from grpc.aio import Metadata

from edgefl.faults.machine.kernel import Node
from edgefl.faults.machine.network import Network, Wire
from edgefl.faults.machine.threads import kernel

OK = grpc.StatusCode.OK


class ServerCall:
    """A call, as its server sees it."""

    def __init__(
        self, client: Any, connection: Wire, server: SimServer, metadata: tuple[Any, ...], certificate: bytes
    ) -> None:
        self._client, self._connection, self._server = client, connection, server
        self.metadata, self.certificate = metadata, certificate
        self._incoming: deque[bytes | None] = deque()
        self._news: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._trailing: tuple[Any, ...] = ()
        self.first = b""  # the first message

    def begin(self) -> None:
        self._news = asyncio.Event()
        self._forget = self._connection.when_lost(self.cancel, at_server=True)
        self._task = asyncio.get_running_loop().create_task(self._serve(), name=self._client.path)

    def take(self, kind: str, data: bytes | None) -> None:
        if not self.first and data:
            self.first = data
        self._incoming.append(None if kind == "half_close" else data)
        if self._news is not None:
            self._news.set()

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _serve(self) -> None:
        method = self._server.method(self._client.path)
        context = SimContext(self)
        status: tuple[grpc.StatusCode, str, tuple[Any, ...]] = (OK, "", ())
        try:
            if method.request_streaming:
                request: Any = self._requests(method.request_deserializer)
            else:
                request = await self._next()
                request = method.request_deserializer(request) if method.request_deserializer else request
            behaviour = method.unary_unary or method.unary_stream or method.stream_unary or method.stream_stream
            context.serialize = method.response_serializer or bytes
            reply = await behaviour(request, context)
            if not method.response_streaming:
                self._server.note(self, reply)
                await context.write(reply)
        except asyncio.CancelledError:
            if not kernel().node or not kernel().node.is_alive:  # type: ignore[union-attr]
                raise
            status = (grpc.StatusCode.CANCELLED, "cancelled at the server", ())
        except grpc.aio.AbortError:
            status = context.status
        except Exception as error:  # noqa: BLE001 - grpc.aio answers so
            self._server.on_error(self._client.path, error)
            status = (grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}", ())
        finally:
            self._forget()
        self.to_client(lambda: self._client.end((*status[:2], self._trailing)))

    def to_client(self, call: Callable[[], object]) -> None:
        self._connection.to_client(call)

    def send(self, data: bytes) -> None:
        self.to_client(lambda: self._client.take(data))

    def begin_reply(self, metadata: Metadata) -> None:
        self.to_client(lambda: self._client.begin(metadata))

    def set_trailing(self, pairs: tuple[Any, ...]) -> None:
        self._trailing = pairs

    async def _next(self) -> bytes | None:
        while not self._incoming:
            self._news = asyncio.Event()
            await self._news.wait()
        return self._incoming.popleft()

    async def _requests(self, decode: Any) -> AsyncIterator[Any]:
        while (data := await self._next()) is not None:
            yield decode(data) if decode else data

    @property
    def client_node(self) -> Node:
        return self._connection.ends[0]

    @property
    def path(self) -> str:
        path: str = self._client.path
        return path


class SimContext:
    """`grpc.aio.ServicerContext`, as far as the servicers use it."""

    def __init__(self, call: ServerCall) -> None:
        self._call = call
        self.serialize: Any = bytes
        self.status: tuple[grpc.StatusCode, str, tuple[Any, ...]] = (OK, "", ())

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._call.certificate]}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[Any, ...]:
        return self._call.metadata

    def set_trailing_metadata(self, pairs: Sequence[Any]) -> None:
        self._call.set_trailing(tuple(pairs))

    async def send_initial_metadata(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._call.begin_reply(Metadata(*pairs))

    async def write(self, message: Any) -> None:
        self._call.send(self.serialize(message))
        await asyncio.sleep(0)

    async def abort(self, code: grpc.StatusCode, details: str = "", _trailing: Any = ()) -> None:
        self.status = (code, details, ())
        raise grpc.aio.AbortError


class SimServer:
    """The handlers at one port."""

    def __init__(self, network: Network, node: Node, handlers: Sequence[Any]) -> None:
        self._network, self._node, self._handlers = network, node, handlers

    def method(self, path: str) -> Any:
        """Return the real handler of a method."""
        details = types.SimpleNamespace(method=path, invocation_metadata=())
        return next(found for one in self._handlers if (found := one.service(details)) is not None)

    def note(self, call: ServerCall, reply: Any) -> None:
        """Note a reply that leaves the server."""
        self._network.on_reply(self._node.name, call.client_node.name, call.path, call.first, reply)

    def on_error(self, path: str, error: BaseException) -> None:
        """Note an error that no servicer should raise."""
        if self._node.is_alive:
            self._node.kernel.report(f"{path} at {self._node.name} raised {error!r}", error)


@contextlib.asynccontextmanager
async def serve(network: Network, port: int, handlers: Sequence[Any]) -> AsyncIterator[None]:
    """Serve gRPC handlers at a port until the node is killed."""
    node = kernel().node
    if node is None:
        raise RuntimeError("a server starts outside of a node")
    network.listen("grpc", port, node, SimServer(network, node, handlers))
    yield
