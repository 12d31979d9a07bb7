"""Which clients may hold connections of a port, and which must be closed: a table without I/O, for every port.

A connection is *waiting* while we wait for its other end (the TLS handshake, its name, the rest of
a request) and *serving* while we work for it. Only waiting connections have a deadline, and only they
are closed to make room: the oldest one of the source that has the most. So a client that opens
thousands pushes out only its own. Invariant: each connection that is evicted or overdue is closed by its owner.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from edgefl.errors import ConfigError

IPV6_SITE_BITS = 64  # one customer of a provider has a network of this size
MAX_LEAVING = 32  # connections being closed, in addition to `max_open`


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """The limits of a port."""

    max_open: int  # connections in any state
    max_waiting: int  # of these, waiting connections
    waiting_s: float  # how long a connection may be waiting

    def __post_init__(self) -> None:
        if not 0 < self.max_waiting <= self.max_open or self.waiting_s <= 0:
            raise ConfigError(
                f"max_waiting={self.max_waiting}, max_open={self.max_open}, waiting_s={self.waiting_s}: expected "
                "0 < max_waiting <= max_open and waiting_s above 0"
            )


class Connection:
    """One connection's place. Its owner passes `close`, which is called with the reason, at most once."""

    __slots__ = ("_table", "close", "deadline_s", "source")

    def __init__(self, table: Connections, source: str, close: Callable[[str], None]) -> None:
        self._table = table
        self.source = source
        self.close = close
        self.deadline_s = 0.0

    def serve(self) -> None:
        """We work for it now: it has no deadline."""
        self._table.serve(self)

    def wait(self, within_s: float | None = None) -> None:
        """We wait for it from now on, for up to `within_s` (by default the table's limit)."""
        self._table.wait(self, within_s)

    def leave(self) -> None:
        """It is closed. May be called more than once."""
        self._table.remove(self)


class Connections:
    """The connections of one port. Not thread-safe."""

    def __init__(self, limits: ConnectionLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock = clock
        self._open: set[Connection] = set()
        self._leaving: set[Connection] = set()  # told to close, not closed yet
        self._waiting: dict[str, dict[Connection, None]] = {}  # by source, the oldest first
        self._num_waiting = 0

    def __len__(self) -> int:
        return len(self._open) + len(self._leaving)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def is_crowded(self) -> bool:
        """Whether so many are closing that a new connection may find no place now, but soon."""
        return len(self._leaving) >= MAX_LEAVING // 2

    def add(self, source: str, close: Callable[[str], None]) -> Connection | None:
        """Add a new connection, which is waiting; close another one if necessary.

        Returns None if all places are taken by serving or closing connections; the caller then
        closes the new one.
        """
        full = len(self._open) >= self.limits.max_open
        crowded = full or self._num_waiting >= self.limits.max_waiting
        if crowded and (len(self._leaving) >= MAX_LEAVING or (not self.evict() and full)):
            return None
        added = Connection(self, source, close)
        self._open.add(added)
        self.wait(added, None)
        return added

    def evict(self) -> bool:
        """Close the oldest waiting connection of the source that has the most; False if none is waiting."""
        if not self._waiting:
            return False
        largest = max(self._waiting.values(), key=len)
        self._close(next(iter(largest)), "others need the place")
        return True

    def close_overdue(self) -> int:
        """Close the connections that missed their deadline, and return how many."""
        now_s = self._clock()
        overdue = [one for group in self._waiting.values() for one in group if one.deadline_s <= now_s]
        for one in overdue:
            self._close(one, "nothing came in time")
        return len(overdue)

    def serve(self, one: Connection) -> None:
        """See `Connection.serve`."""
        group = self._waiting.get(one.source)
        if group is not None and one in group:
            del group[one]
            self._num_waiting -= 1
            if not group:
                del self._waiting[one.source]

    def wait(self, one: Connection, within_s: float | None) -> None:
        """See `Connection.wait`."""
        if one not in self._open:
            return
        self.serve(one)
        one.deadline_s = self._clock() + (self.limits.waiting_s if within_s is None else within_s)
        self._waiting.setdefault(one.source, {})[one] = None
        self._num_waiting += 1

    def remove(self, one: Connection) -> None:
        """See `Connection.leave`."""
        self.serve(one)
        self._open.discard(one)
        self._leaving.discard(one)

    def _close(self, one: Connection, reason: str) -> None:
        self.serve(one)
        self._open.discard(one)
        self._leaving.add(one)  # until its owner calls `leave`
        one.close(reason)


def source_of(address: str) -> str:
    """Return the source of an address: the address itself, or its /64 network for IPv6."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, IPV6_SITE_BITS), strict=False))
    return str(parsed)
