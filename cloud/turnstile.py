"""Lets transfers in a few at a time, without letting slow ones hold up the rest.

Two fast transfers fill cores and disk; ten at once take as long, and their buffers ten times the
memory. A transfer that is not done soon is bound by its own link and costs neither: it gives its turn
on, and goes on beside the others. So a thousand slow devices upload together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

TURNS = 2
TURN_S = 0.5
MAX_INSIDE = 128  # of a megabyte or two of buffers each


class Turnstile:
    """Belongs to one event loop."""

    def __init__(self, turns: int = TURNS, turn_s: float = TURN_S, max_inside: int = MAX_INSIDE) -> None:
        self._turns = asyncio.Semaphore(turns)
        self._inside = asyncio.Semaphore(max_inside)
        self._turn_s = turn_s

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn; it ends with the block or after `turn_s`, whichever is first."""
        async with self._inside:
            await self._turns.acquire()
            timer = asyncio.get_running_loop().call_later(self._turn_s, self._turns.release)
            try:
                yield
            finally:
                if asyncio.get_running_loop().time() < timer.when():
                    timer.cancel()
                    self._turns.release()
