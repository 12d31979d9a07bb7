"""Limits connections to the gRPC port: unknown clients get few for a short time, each device a few, all a maximum.

gRPC's C core accepts connections by itself, and has no callback before the first call. `options` has the limits
that it enforces: the number of connections, a deadline for TLS, pings for dead ones. The rest is done from outside:
every second we find our own sockets of the port in /dev/fd. A socket without an admitted call is *waiting*, and is
shut down when its deadline has passed or its place is needed: by shutdown(2), on a duplicate of its descriptor, whose
number cannot be reused meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import logging
import os
import socket
import stat
import urllib.parse
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cloud.shares import PortShare
from edgefl.logs import event
from edgefl.protocols.ports.connections import Connection, Connections, source_of
from edgefl.protocols.ports.pacing import TokenBucket

SWEEP_S, CROWDED_SWEEP_S = 1.0, 0.1  # the second while many are waiting
CONNECTIONS_OF_A_DEVICE = 4
STREAMS_OF_A_CONNECTION = 32
LEAST_PENDING, PENDING_OF_A_SEAT = 1000, 2  # calls that may wait to be accepted at the same time
HANDSHAKE_S = 10
MAX_PEERS = 4096  # parsed addresses in the cache, which each call of a connection has
_DESCRIPTORS = "/dev/fd"

Peer = tuple[str, int]  # address and port

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PortPace:
    """How many calls each device may make."""

    per_s: float = 300.0  # a round needs three
    burst: float = 1000.0


DATA_PLANE_PACE = PortPace()


@dataclass(frozen=True, slots=True)
class Found:
    """One of this process's sockets: an accepted connection of the port."""

    descriptor: int
    inode: int  # because the descriptor's number may have been reused
    peer: Peer


@dataclass(slots=True)
class _Device:
    """A device's share of calls, and its connections, the oldest first."""

    calls: TokenBucket
    peers: dict[Peer, None] = field(default_factory=dict)


class GrpcPort:
    """The connections of the gRPC port. Used in the event loop only."""

    def __init__(
        self, share: PortShare, port: int, full: str, clock: Callable[[], float], pace: PortPace = DATA_PLANE_PACE
    ) -> None:
        self._share, self._full, self._clock, self._pace = share, full, clock, pace
        self._scanner = Scanner(port)
        self._connections = Connections(share.limits(), clock)
        self._places: dict[Peer, Connection] = {}  # of the sockets that were found
        self._seats: dict[Peer, str] = {}  # device of each admitted connection
        self._not_found: dict[Peer, int] = {}  # admitted connections without a socket yet: scans so far
        self._devices: dict[str, _Device] = {}

    @property
    def options(self) -> list[tuple[str, int]]:
        """The server options with the limits that the C core enforces."""
        pending = max(LEAST_PENDING, PENDING_OF_A_SEAT * self._share.seats)
        return [
            ("grpc.max_allowed_incoming_connections", self._share.limits().max_open),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
            ("grpc.max_concurrent_streams", STREAMS_OF_A_CONNECTION),
            # Its default is 1,000 in all, and it cancels some above that: too few for a round of a large fleet.
            ("grpc.server.max_pending_requests", pending),
            ("grpc.server.max_pending_requests_hard_limit", 2 * pending),
            ("grpc.keepalive_time_ms", 60_000),  # devices call `Next` twice a minute
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ]

    def admit(self, device: str, peer: str) -> str:
        """Give the connection of an enrolled device a seat; return why there is none, empty if there is.

        If a device has too many connections, its oldest one is closed.
        """
        key = parse_peer(peer)
        if self._seats.get(key) == device:
            return ""
        held = self._of(device).peers
        full = len(self._seats) >= self._share.seats
        if full and not held:
            event(_log, logging.WARNING, "device.no_seat", device=device, seats=self._share.seats)
            return self._full
        if full or len(held) >= CONNECTIONS_OF_A_DEVICE:
            self._unseat(next(iter(held)))
        self._forget(key)  # the address may have been another device's
        self._seats[key] = device
        held[key] = None
        if key in self._places:
            self._places[key].serve()
        else:
            self._not_found[key] = 0
        return ""

    def drop(self, device: str) -> None:
        """Close the connections of a removed device at the next scan, after its calls were aborted."""
        if device in self._devices:
            for peer in list(self._devices[device].peers):
                self._unseat(peer)

    def pace(self, device: str) -> float:
        """Count a call of a device; return how long it must wait (s)."""
        return self._of(device).calls.take()

    async def watch(self) -> None:
        """Scan for connections periodically until cancelled."""
        while True:
            crowded = 2 * self._connections.num_waiting > self._share.waiting
            await asyncio.sleep(CROWDED_SWEEP_S if crowded else SWEEP_S)
            self.update(*await asyncio.to_thread(self._scanner.scan))

    def update(self, new: Sequence[Found], gone: Sequence[Found]) -> None:
        """Register new connections, forget closed ones, and shut down overdue ones."""
        for found in gone:
            if found.peer in self._places:
                self._places.pop(found.peer).leave()
            self._forget(found.peer)
        for found in new:
            self._take(found)
        for peer, scans in list(self._not_found.items()):
            self._not_found[peer] = scans + 1
            if scans >= 2:  # it was opened and closed between two scans
                self._forget(peer)
        self._connections.close_overdue()
        for name in [name for name, one in self._devices.items() if not one.peers and one.calls.idle()]:
            del self._devices[name]

    def _take(self, found: Found) -> None:
        place = self._connections.add(source_of(found.peer[0]), lambda _reason: shut(found))
        if place is None:
            shut(found)
            return
        self._places[found.peer] = place
        if self._not_found.pop(found.peer, None) is not None:
            place.serve()

    def _of(self, device: str) -> _Device:
        if device not in self._devices:
            self._devices[device] = _Device(TokenBucket(self._pace.per_s, self._pace.burst, self._clock))
        return self._devices[device]

    def _unseat(self, peer: Peer) -> None:
        self._forget(peer)
        if peer in self._places:
            self._places[peer].wait(0.0)  # shut down at the next scan

    def _forget(self, peer: Peer) -> None:
        self._not_found.pop(peer, None)
        device = self._seats.pop(peer, None)
        if device is not None:
            self._devices[device].peers.pop(peer, None)


class Scanner:
    """Finds this process's accepted connections of one port. Not thread-safe."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._known: dict[tuple[int, int], Found | None] = {}  # by descriptor and inode; None: another socket

    def scan(self) -> tuple[list[Found], list[Found]]:
        """Return the connections that are new since the last scan, and those that are closed."""
        before, self._known = self._known, {}
        for key in _sockets():
            self._known[key] = before[key] if key in before else _accepted(*key, self._port)
        return _only_in(self._known, before), _only_in(before, self._known)


def _only_in(some: Mapping[tuple[int, int], Found | None], others: Container[tuple[int, int]]) -> list[Found]:
    return [found for key, found in some.items() if found is not None and key not in others]


def shut(found: Found) -> None:
    """Shut down a connection in both directions; do nothing if it is already closed."""
    with contextlib.suppress(OSError), _duplicate(found.descriptor) as connection:
        if os.fstat(connection.fileno()).st_ino == found.inode:
            connection.shutdown(socket.SHUT_RDWR)


@functools.lru_cache(MAX_PEERS)
def parse_peer(peer: str) -> Peer:
    """Return address and port of gRPC's `ipv4:1.2.3.4:5` or `ipv6:[::1]:5`."""
    address, _, number = urllib.parse.unquote(peer).partition(":")[2].rpartition(":")
    return _plain(address.strip("[]")), int(number) if number.isdecimal() else 0


def _sockets() -> Iterator[tuple[int, int]]:
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208 - a Path for each number, every second
        with contextlib.suppress(OSError):  # closed in the meantime
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


def _accepted(descriptor: int, inode: int, port: int) -> Found | None:
    with contextlib.suppress(OSError), _duplicate(descriptor) as connection:
        if connection.family in {socket.AF_INET, socket.AF_INET6} and connection.getsockname()[1] == port:
            address, number = connection.getpeername()[:2]  # raises OSError for the listening socket
            return Found(descriptor, inode, (_plain(str(address)), int(number)))
    return None


@contextlib.contextmanager
def _duplicate(descriptor: int) -> Iterator[socket.socket]:
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with connection:
        yield connection


def _plain(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)
