"""A token bucket: a burst, a rate per second, and how long to wait above them.

Excess is delayed, not refused: while we do not read from a sender, the network's flow control slows it down.
"""

from __future__ import annotations

from collections.abc import Callable

from edgefl.errors import ConfigError

MAX_KEYS = 10_000


class TokenBucket:
    """Allows `per_s` per second, plus unused amounts up to `burst`. Not thread-safe."""

    __slots__ = ("_clock", "_full_s", "_paid_until_s", "per_s")

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float]) -> None:
        if per_s <= 0 or burst < 0:
            raise ConfigError(f"per_s={per_s}, burst={burst}: expected per_s above 0 and burst of 0 or more")
        self.per_s = per_s
        self._full_s = burst / per_s
        self._clock = clock
        self._paid_until_s = clock()

    def take(self, amount: float = 1.0) -> float:
        """Take an amount, and return how many seconds the caller should wait; 0 within the burst.

        The amount is taken in any case: the debt shows how far the caller is above its share.
        """
        now_s = self._clock()
        self._paid_until_s = max(now_s, self._paid_until_s) + amount / self.per_s
        return max(0.0, self._paid_until_s - now_s - self._full_s)

    def idle(self) -> bool:
        """Whether the bucket is full again, like a new one."""
        return self._paid_until_s <= self._clock()


class Buckets:
    """One bucket per key. Clients can make up keys, such as addresses, so the number of buckets is limited."""

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float], most: int = MAX_KEYS) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._most = most
        self._buckets: dict[str, TokenBucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def of(self, key: str) -> TokenBucket:
        """Return a key's bucket; beyond the limit, all further keys share one."""
        if key not in self._buckets and len(self._buckets) >= self._most:
            self._buckets = {name: one for name, one in self._buckets.items() if not one.idle()}
            if len(self._buckets) >= self._most:
                key = ""
        if key not in self._buckets:
            self._buckets[key] = TokenBucket(self._per_s, self._burst, self._clock)
        return self._buckets[key]
