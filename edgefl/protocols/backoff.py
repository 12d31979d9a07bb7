"""The delay before the next attempt: it doubles up to a limit, and differs between clients by their names.

All retries use it, whether they wait on a clock, a condition or an event loop.

A client that was told that there is no free place waits longer, because each attempt costs the server a handshake.
"""

from __future__ import annotations

import zlib

FULL_FIRST_S, FULL_LAST_S = 5.0, 60.0


class Backoff:
    """The delays of one client; without a name they are not spread."""

    def __init__(self, first_s: float, last_s: float, name: str = "") -> None:
        self._spread = 1 + zlib.crc32(name.encode()) % 1000 / 1000  # not random, so tests can predict it
        self._first_s, self._last_s = first_s, last_s
        self._delay_s = 0.0

    def reset(self) -> None:
        """Start again with the first delay, after a success."""
        self._delay_s = 0.0

    def next_s(self, *, full: bool = False) -> float:
        """Return the next delay; `full`: there was no free place."""
        first_s, last_s = (FULL_FIRST_S, FULL_LAST_S) if full else (self._first_s, self._last_s)
        begun = self._delay_s >= first_s
        self._delay_s = min(
            last_s * (self._spread if full else 1), 2 * self._delay_s if begun else first_s * self._spread
        )
        return self._delay_s
