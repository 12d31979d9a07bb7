"""A listening socket whose connections are counted from the moment they are accepted, before any TLS.

asyncio's own servers do not report a connection until its handshake is done, and accept as many as there
are descriptors. This one accepts by itself, asks `Connections` for a place, and passes the socket to the
event loop (asyncio's or uvloop's). A connection is closed by shutting down its socket, which the loop
treats as its end in any state.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from edgefl.errors import ConfigError
from edgefl.logs import event
from edgefl.protocols.addresses import bracketed
from edgefl.protocols.ports.connections import Connection, Connections, source_of

SWEEP_S = 0.5  # interval of checks for overdue connections
CROWDED_S, CROWDED_TURNS = 0.01, 20  # wait this often and long until closing connections are gone
NO_DESCRIPTOR_S = 0.1  # before the next attempt to accept
TLS_GOODBYE_S = 1.0
BACKLOG = 1024
FIRST_FREE_PORT = 1024  # lower ports need root or CAP_NET_BIND_SERVICE
_OWN_ADDRESS = "give {host_flag} an address of this machine: 127.0.0.1 for local clients, 0.0.0.0 for all interfaces"
_BROKEN = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})  # of the listening socket itself
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_log = logging.getLogger(__name__)

ProtocolFactory = Callable[[Connection], asyncio.Protocol]


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """A listening socket, with its name and TLS."""

    name: str  # for the log
    socket: socket.socket
    context: Callable[[], ssl.SSLContext] | None = None  # called per connection; None = no TLS


class Listener:
    """Accepts connections until it is closed. A connection's protocol calls `leave` when the connection is lost."""

    def __init__(self, port: Port, connections: Connections, make_protocol: ProtocolFactory) -> None:
        self._port = port
        self._connections = connections
        self._make_protocol = make_protocol
        self._handshakes: set[asyncio.Task[None]] = set()
        self._ungreeted: set[socket.socket] = set()  # their tasks have not begun, and never will if cancelled before
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The listener's tasks, which end when it is closed."""
        return list(self._tasks)

    @property
    def port_number(self) -> int:
        """The TCP port."""
        number: int = self._port.socket.getsockname()[1]
        return number

    def start(self) -> None:
        """Start to accept, in the running event loop."""
        self._port.socket.setblocking(False)  # noqa: FBT003 - the socket's own way
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._kept(self._accept), name=f"accept-{self._port.name}"),
            loop.create_task(self._kept(self._sweep), name=f"sweep-{self._port.name}"),
        ]

    def close(self) -> None:
        """Stop accepting, and close the socket; connections after their handshake stay open."""
        for task in (*self._tasks, *self._handshakes):
            task.cancel()
        if self._port.socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._port.socket)  # before its descriptor number can be reused
            self._port.socket.close()
        while self._ungreeted:
            self._ungreeted.pop().close()

    async def wait_closed(self) -> None:
        """Wait until its tasks have ended."""
        await asyncio.gather(*self._tasks, *self._handshakes, return_exceptions=True)

    async def _kept(self, work: Callable[[], Awaitable[None]]) -> None:
        """Restart a part after a defect that one connection has triggered."""
        while True:
            try:
                await work()
            except Exception as fault:
                if isinstance(fault, OSError) and fault.errno in _BROKEN:
                    raise  # no client can connect any more
                _log.critical("port.fault port=%s", self._port.name, exc_info=True)
                await asyncio.sleep(NO_DESCRIPTOR_S)

    async def _accept(self) -> None:
        while True:
            try:
                # Not `loop.sock_accept`: cancelled in the wrong moment, it loses the socket that it has accepted.
                connection, address = self._port.socket.accept()
            except BlockingIOError:
                await self._readable()
                continue
            except OSError as fault:
                if fault.errno in _BROKEN:
                    raise
                if fault.errno not in _SCARCE:
                    await asyncio.sleep(0)
                    continue  # closed before it was accepted
                event(_log, logging.ERROR, "port.no_descriptors", port=self._port.name, reason=fault)
                self._connections.evict()
                await asyncio.sleep(NO_DESCRIPTOR_S)
                continue
            connection.setblocking(False)  # noqa: FBT003 - the socket's own way
            self._take(connection, str(address[0]))
            await asyncio.sleep(0)  # nothing above yields while connections are queued
            for _ in range(CROWDED_TURNS):  # the next one waits in the kernel's queue instead of being refused
                if not self._connections.is_crowded:
                    break
                await asyncio.sleep(CROWDED_S)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[None] = loop.create_future()

        def note() -> None:
            loop.remove_reader(self._port.socket)
            if not seen.done():
                seen.set_result(None)

        loop.add_reader(self._port.socket, note)
        await seen

    def _take(self, connection: socket.socket, address: str) -> None:
        place = self._connections.add(source_of(address), _shutting_down(connection))
        if place is None:
            event(_log, logging.WARNING, "port.full", port=self._port.name, connections=len(self._connections))
            connection.close()
            return
        with contextlib.suppress(OSError):  # it is already gone
            # asyncio does so only if the listening socket was created with its protocol number.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ungreeted.add(connection)
        task = asyncio.create_task(self._greet(connection, place), name=f"handshake-{self._port.name}")
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _greet(self, connection: socket.socket, place: Connection) -> None:
        self._ungreeted.discard(connection)
        tls = {} if self._port.context is None else {
            "ssl_handshake_timeout": self._connections.limits.waiting_s, "ssl_shutdown_timeout": TLS_GOODBYE_S,
        }  # fmt: skip
        try:
            context = None if self._port.context is None else self._port.context()
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._make_protocol(place), connection, ssl=context, **tls
            )
        except OSError as fault:  # from the connection or from TLS
            event(_log, logging.DEBUG, "port.no_handshake", port=self._port.name, source=place.source, reason=fault)
            place.leave()
        except asyncio.CancelledError:
            place.leave()
            raise
        else:
            if transport.is_closing():  # perhaps before its protocol was told
                place.leave()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._connections.close_overdue()


def listen(host: str, port: int, port_flag: str, host_flag: str = "--host") -> socket.socket:
    """Bind a TCP port (0 = any free one); raises ConfigError, which says what to change, and with which flag."""
    with contextlib.ExitStack() as undo:
        try:
            # Explicitly TCP: else asyncio does not set TCP_NODELAY, and each answer would wait for an acknowledgement.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except (OSError, UnicodeError) as cause:  # the latter for an invalid host name
            seen, remedy = _what_is_wrong(cause, host, port)
            remedy = remedy.format(port_flag=port_flag, host_flag=host_flag)
            raise ConfigError(f"cannot listen on {bracketed(host)}:{port}: {seen}; {remedy}") from cause
        undo.pop_all()
    return listener


def _what_is_wrong(cause: OSError | UnicodeError, host: str, port: int) -> tuple[str, str]:
    """Return what is wrong with an address, and how to fix it."""
    if isinstance(cause, UnicodeError | socket.gaierror):
        return f"no address was found for the name {host!r}", _OWN_ADDRESS
    if cause.errno == errno.EADDRNOTAVAIL:
        return f"this machine does not have the address {host}", _OWN_ADDRESS
    if cause.errno == errno.EADDRINUSE:
        return "another program uses this port", "stop it, or choose another {port_flag}"
    if cause.errno in {errno.EACCES, errno.EPERM} and port < FIRST_FREE_PORT:
        return f"ports below {FIRST_FREE_PORT} need root", "choose a {port_flag} above that, or run it as root"
    return str(cause.strerror), "choose another {host_flag} or {port_flag}"


def _shutting_down(connection: socket.socket) -> Callable[[str], None]:
    def close(_reason: str) -> None:
        with contextlib.suppress(OSError):  # the other end has already closed it
            connection.shutdown(socket.SHUT_RDWR)

    return close
