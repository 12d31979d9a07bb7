"""Who may hold a connection of a port, and who has to go: a table without I/O, the same for every port.

A connection is *waiting* while its other end owes us something (the TLS handshake, its name, the rest of
a request) and *settled* while we owe it something. Only the waiting are bounded in time, and only they
are closed to make room, the oldest of the source with the most of them first: so a stranger who opens
thousands pushes out its own. Invariant: what `add` and `overdue` name is closed by its owner.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from edgefl.errors import ConfigError

IPV6_SITE_BITS = 64  # one customer of a provider has so many addresses
MAX_LEAVING = 32  # connections that are being closed, above what a port may hold


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """What a port may hold."""

    max_open: int  # connections, whatever they are at
    max_waiting: int  # of them, connections that owe us something
    waiting_s: float  # for what they owe

    def __post_init__(self) -> None:
        if not 0 < self.max_waiting <= self.max_open or self.waiting_s <= 0:
            raise ConfigError(
                f"max_waiting={self.max_waiting}, max_open={self.max_open}, waiting_s={self.waiting_s}: expected "
                "0 < max_waiting <= max_open and waiting_s above 0"
            )


class Connection:
    """One connection's place. `close` is its owner's: it is called with the reason, once at most."""

    __slots__ = ("_table", "close", "deadline_s", "source")

    def __init__(self, table: Connections, source: str, close: Callable[[str], None]) -> None:
        self._table = table
        self.source = source
        self.close = close
        self.deadline_s = 0.0

    def settle(self) -> None:
        """It owes us nothing now."""
        self._table.settle(self)

    def wait(self, within_s: float | None = None) -> None:
        """It owes us something, from now on and for so long; the table's usual time if none is given."""
        self._table.wait(self, within_s)

    def leave(self) -> None:
        """It is closed. May be called again."""
        self._table.remove(self)


class Connections:
    """The connections of one port. Belongs to one thread."""

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
        """Whether so many are leaving that a new one might find no place, which it would a moment later."""
        return len(self._leaving) >= MAX_LEAVING // 2

    def add(self, source: str, close: Callable[[str], None]) -> Connection | None:
        """Take a new connection, which waits; close the one that has to go for it.

        None: every place is taken by a settled connection, or by ones that are being closed. The caller
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
        """Close the oldest waiting connection of the source that has the most; False where none waits."""
        if not self._waiting:
            return False
        largest = max(self._waiting.values(), key=len)
        self._close(next(iter(largest)), "others need the place")
        return True

    def close_overdue(self) -> int:
        """Close those that let their time pass, and return how many."""
        now_s = self._clock()
        overdue = [one for group in self._waiting.values() for one in group if one.deadline_s <= now_s]
        for one in overdue:
            self._close(one, "nothing came in time")
        return len(overdue)

    def settle(self, one: Connection) -> None:
        """See `Connection.settle`."""
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
        self.settle(one)
        one.deadline_s = self._clock() + (self.limits.waiting_s if within_s is None else within_s)
        self._waiting.setdefault(one.source, {})[one] = None
        self._num_waiting += 1

    def remove(self, one: Connection) -> None:
        """See `Connection.leave`."""
        self.settle(one)
        self._open.discard(one)
        self._leaving.discard(one)

    def _close(self, one: Connection, reason: str) -> None:
        self.settle(one)
        self._open.discard(one)
        self._leaving.add(one)  # until its owner says that it has left
        one.close(reason)


def source_of(address: str) -> str:
    """Return what an address is counted under: itself, or its network of 64 bits for IPv6."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, IPV6_SITE_BITS), strict=False))
    return str(parsed)
