"""A token bucket: so much at once, so much a second, and how long to wait where that is not enough.

Waiting rather than refusing: who is not read any further is held back by the network's own flow control.
"""

from __future__ import annotations

from collections.abc import Callable

from edgefl.errors import ConfigError

MAX_KEYS = 10_000


class TokenBucket:
    """Gives `per_s` a second, and what was not used up to `burst`. Belongs to one thread."""

    __slots__ = ("_clock", "_full_s", "_paid_until_s", "per_s")

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float]) -> None:
        if per_s <= 0 or burst < 0:
            raise ConfigError(f"per_s={per_s}, burst={burst}: expected per_s above 0 and burst of 0 or more")
        self.per_s = per_s
        self._full_s = burst / per_s
        self._clock = clock
        self._paid_until_s = clock()

    def take(self, amount: float = 1.0) -> float:
        """Take an amount, and return for how many seconds its taker is to wait; 0 within the burst.

        What is taken is taken: the debt is the measure of how far above its share the taker is.
        """
        now_s = self._clock()
        self._paid_until_s = max(now_s, self._paid_until_s) + amount / self.per_s
        return max(0.0, self._paid_until_s - now_s - self._full_s)

    def idle(self) -> bool:
        """Whether all that was taken has been given again, so that a new bucket would be the same."""
        return self._paid_until_s <= self._clock()


class Buckets:
    """A bucket for each of many keys, such as addresses, which a stranger can make up; so they are bounded."""

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float], most: int = MAX_KEYS) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._most = most
        self._buckets: dict[str, TokenBucket] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def of(self, key: str) -> TokenBucket:
        """Return a key's bucket; beyond so many keys at once, further ones share one."""
        if key not in self._buckets and len(self._buckets) >= self._most:
            self._buckets = {name: one for name, one in self._buckets.items() if not one.idle()}
            if len(self._buckets) >= self._most:
                key = ""
        if key not in self._buckets:
            self._buckets[key] = TokenBucket(self._per_s, self._burst, self._clock)
        return self._buckets[key]
