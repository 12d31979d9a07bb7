"""The rate limit of one device at the built-in broker, in packets and bytes per second, for all kinds of packets.

A healthy device sends a few packets per minute. Above the limit we stop reading, and TCP slows the device down.
"""

from __future__ import annotations

from collections.abc import Callable

from edgefl.errors import ProtocolError
from edgefl.protocols.ports.pacing import TokenBucket

PACKETS_PER_S, PACKETS_BURST = 200, 1000
BYTES_PER_S, BYTES_BURST = 256 << 10, 2 << 20
PATIENCE_S = 30.0  # a device that is above its share for longer is disconnected


class Share:
    """One device's share of the broker."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._packets = TokenBucket(PACKETS_PER_S, PACKETS_BURST, clock)
        self._bytes = TokenBucket(BYTES_PER_S, BYTES_BURST, clock)
        self._above_since_s: float | None = None

    def take(self, size: int) -> float:
        """Count a packet; return for how many seconds to pause reading. Raises ProtocolError after PATIENCE_S."""
        wait_s = max(self._packets.take(), self._bytes.take(size))
        now_s = self._clock()
        if wait_s <= 0:
            self._above_since_s = None
        elif self._above_since_s is None:
            self._above_since_s = now_s
        elif now_s - self._above_since_s > PATIENCE_S:
            raise ProtocolError(
                f"for {PATIENCE_S:g} s it sent more than its share of {PACKETS_PER_S} packets and "
                f"{BYTES_PER_S >> 10} kB per second"
            )
        return wait_s
