"""A listening socket whose connections are counted from the moment they are accepted, before any TLS.

asyncio's own servers tell nobody of a connection until its handshake is done, and take as many as there
are descriptors. This one accepts by itself, asks `Connections` for a place, and hands the socket to the
event loop (asyncio's or uvloop's). A connection is closed by shutting its socket down, which the loop
sees as its end, whatever it is at.
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

SWEEP_S = 0.5  # how often the overdue are looked for
CROWDED_S, CROWDED_TURNS = 0.01, 20  # for connections that were told to close to be gone
NO_DESCRIPTOR_S = 0.1  # before the next try to accept
TLS_GOODBYE_S = 1.0
BACKLOG = 1024
FIRST_FREE_PORT = 1024  # those below are for root, or for who was given CAP_NET_BIND_SERVICE
_OWN_ADDRESS = "give {host_flag} an address of this machine: 127.0.0.1 for itself alone, 0.0.0.0 for all it has"
_BROKEN = frozenset({errno.EBADF, errno.EINVAL, errno.ENOTSOCK})  # of the listening socket itself
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_log = logging.getLogger(__name__)

ProtocolFactory = Callable[[Connection], asyncio.Protocol]


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """What is listened on, and how it is spoken there."""

    name: str  # for the log
    socket: socket.socket
    context: Callable[[], ssl.SSLContext] | None = None  # asked at each connection; None = no TLS


class Listener:
    """Accepts until it is closed. The protocol of a connection calls its `leave` when the connection is lost."""

    def __init__(self, port: Port, connections: Connections, make_protocol: ProtocolFactory) -> None:
        self._port = port
        self._connections = connections
        self._make_protocol = make_protocol
        self._handshakes: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Its tasks, which end when it is closed."""
        return list(self._tasks)

    @property
    def port_number(self) -> int:
        """The TCP port."""
        number: int = self._port.socket.getsockname()[1]
        return number

    def start(self) -> None:
        """Begin to accept, in the running event loop."""
        self._port.socket.setblocking(False)  # noqa: FBT003 - the socket's own way
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._kept(self._accept), name=f"accept-{self._port.name}"),
            loop.create_task(self._kept(self._sweep), name=f"sweep-{self._port.name}"),
        ]

    def close(self) -> None:
        """Accept no more, and close the socket; connections whose handshake is done stay."""
        for task in (*self._tasks, *self._handshakes):
            task.cancel()
        if self._port.socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._port.socket)  # before its number can be another's
            self._port.socket.close()

    async def wait_closed(self) -> None:
        """Wait until its tasks have ended."""
        await asyncio.gather(*self._tasks, *self._handshakes, return_exceptions=True)

    async def _kept(self, work: Callable[[], Awaitable[None]]) -> None:
        """Go on with a part after a defect of ours that one connection has found."""
        while True:
            try:
                await work()
            except Exception as fault:
                if isinstance(fault, OSError) and fault.errno in _BROKEN:
                    raise  # nobody can connect any more
                _log.critical("port.fault port=%s", self._port.name, exc_info=True)
                await asyncio.sleep(NO_DESCRIPTOR_S)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._port.socket)
            except OSError as fault:
                if fault.errno in _BROKEN:
                    raise
                if fault.errno not in _SCARCE:
                    await asyncio.sleep(0)
                    continue  # this connection was gone before it was accepted
                event(_log, logging.ERROR, "port.no_descriptors", port=self._port.name, reason=fault)
                self._connections.evict()
                await asyncio.sleep(NO_DESCRIPTOR_S)
                continue
            self._take(connection, str(address[0]))
            await asyncio.sleep(0)  # `sock_accept` does not wait while others stand in line
            for _ in range(CROWDED_TURNS):  # the next waits in the kernel's queue, rather than being refused
                if not self._connections.is_crowded:
                    break
                await asyncio.sleep(CROWDED_S)

    def _take(self, connection: socket.socket, address: str) -> None:
        place = self._connections.add(source_of(address), _shutting_down(connection))
        if place is None:
            event(_log, logging.WARNING, "port.full", port=self._port.name, connections=len(self._connections))
            connection.close()
            return
        with contextlib.suppress(OSError):  # it is gone already
            # asyncio does so only where the listening socket was made with its protocol's number.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.create_task(self._greet(connection, place), name=f"handshake-{self._port.name}")
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _greet(self, connection: socket.socket, place: Connection) -> None:
        tls = {} if self._port.context is None else {
            "ssl_handshake_timeout": self._connections.limits.waiting_s, "ssl_shutdown_timeout": TLS_GOODBYE_S,
        }  # fmt: skip
        try:
            context = None if self._port.context is None else self._port.context()
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._make_protocol(place), connection, ssl=context, **tls
            )
        except OSError as fault:  # of the connection, or of TLS
            event(_log, logging.DEBUG, "port.no_handshake", port=self._port.name, source=place.source, reason=fault)
            place.leave()
        except asyncio.CancelledError:
            place.leave()
            raise
        else:
            if transport.is_closing():  # perhaps before its protocol heard of it
                place.leave()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._connections.close_overdue()


def listen(host: str, port: int, port_flag: str, host_flag: str = "--host") -> socket.socket:
    """Take a TCP port (0 = any that is free); raises ConfigError, which says what to change, and by which flag."""
    with contextlib.ExitStack() as undo:
        try:
            # TCP by name: asyncio sets TCP_NODELAY on no other, and each answer would wait for its acknowledgement.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except (OSError, UnicodeError) as cause:  # the latter of a host that can be no name
            seen, remedy = _what_is_wrong(cause, host, port)
            remedy = remedy.format(port_flag=port_flag, host_flag=host_flag)
            raise ConfigError(f"cannot listen on {bracketed(host)}:{port}: {seen}; {remedy}") from cause
        undo.pop_all()
    return listener


def _what_is_wrong(cause: OSError | UnicodeError, host: str, port: int) -> tuple[str, str]:
    """Return what is wrong with an address, and what to do about it."""
    if isinstance(cause, UnicodeError | socket.gaierror):
        return f"no address is known by the name {host!r}", _OWN_ADDRESS
    if cause.errno == errno.EADDRNOTAVAIL:
        return f"this machine does not have the address {host}", _OWN_ADDRESS
    if cause.errno == errno.EADDRINUSE:
        return "another program listens there", "stop it, or choose another {port_flag}"
    if cause.errno in {errno.EACCES, errno.EPERM} and port < FIRST_FREE_PORT:
        return f"ports below {FIRST_FREE_PORT} are for root alone", "choose a {port_flag} above that, or run it as root"
    return str(cause.strerror), "choose another {host_flag} or {port_flag}"


def _shutting_down(connection: socket.socket) -> Callable[[str], None]:
    def close(_reason: str) -> None:
        with contextlib.suppress(OSError):  # the other end was quicker
            connection.shutdown(socket.SHUT_RDWR)

    return close
