"""How long to wait before the next attempt: doubling up to a limit, spread over a fleet by each one's name.

Everything that tries again waits by this, whatever it waits with: a clock, a condition, an event loop.

One that is told that there is no place waits longer: its attempts cost the other end a handshake each.
"""

from __future__ import annotations

import zlib

FULL_FIRST_S, FULL_LAST_S = 5.0, 60.0


class Backoff:
    """The delays of one client; without a name they are the plain ones."""

    def __init__(self, first_s: float, last_s: float, name: str = "") -> None:
        self._spread = 1 + zlib.crc32(name.encode()) % 1000 / 1000  # no random number: tests can say what it is
        self._first_s, self._last_s = first_s, last_s
        self._delay_s = 0.0

    def reset(self) -> None:
        """It went well."""
        self._delay_s = 0.0

    def next_s(self, *, full: bool = False) -> float:
        """Return how long to wait now; `full`: there was no place."""
        first_s, last_s = (FULL_FIRST_S, FULL_LAST_S) if full else (self._first_s, self._last_s)
        begun = self._delay_s >= first_s
        self._delay_s = min(
            last_s * (self._spread if full else 1), 2 * self._delay_s if begun else first_s * self._spread
        )
        return self._delay_s
