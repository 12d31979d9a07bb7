"""Lets transfers in a few at a time, without letting slow ones hold up the rest.

Two fast transfers fill cores and disk; ten at once take as long, and their buffers ten times the
memory. A transfer that is not done soon is bound by its own link and costs neither: it gives its turn
on, and goes on beside the others. So a thousand slow devices upload together.
Invariant: no device holds more than a few places, and none that does not move: its newest transfers
cut off its oldest, whose connection is dead as a rule.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

TURNS = 2
TURN_S = 0.5
MAX_INSIDE = 128  # of a megabyte or two of buffers each
STALL_S = 120.0  # a megabyte at 70 kbit/s


class Transfer:
    """One transfer and the time that it has left. Belongs to one event loop."""

    def __init__(self, scope: asyncio.Timeout, stall_s: float) -> None:
        self._scope, self._stall_s = scope, stall_s
        self._cut_off = False

    def moved(self) -> None:
        """Its time begins again, unless it was cut off."""
        if not self._cut_off:
            self._scope.reschedule(asyncio.get_running_loop().time() + self._stall_s)

    def cut_off(self) -> None:
        self._cut_off = True
        self._scope.reschedule(asyncio.get_running_loop().time())


class Turnstile:
    """Belongs to one event loop."""

    def __init__(
        self, turns: int = TURNS, turn_s: float = TURN_S, max_inside: int = MAX_INSIDE, max_each: int = 1,
        stall_s: float = STALL_S,
    ) -> None:  # fmt: skip
        self._turns = asyncio.Semaphore(turns)
        self._inside = asyncio.Semaphore(max_inside)
        self._turn_s, self._max_each, self._stall_s = turn_s, max_each, stall_s
        self._transfers: dict[str, list[Transfer]] = {}  # by device, the oldest first

    @contextlib.asynccontextmanager
    async def turn(self, device: str) -> AsyncIterator[Transfer]:
        """Wait for a turn; it ends with the block or after `turn_s`, whichever is first.

        Raises TimeoutError where the transfer does not say `moved` in time, or newer ones take its place.
        """
        async with asyncio.timeout(None) as scope:
            with self._place(device, Transfer(scope, self._stall_s)) as transfer:
                async with self._inside:
                    await self._turns.acquire()
                    timer = asyncio.get_running_loop().call_later(self._turn_s, self._turns.release)
                    transfer.moved()
                    try:
                        yield transfer
                    finally:
                        if asyncio.get_running_loop().time() < timer.when():
                            timer.cancel()
                            self._turns.release()

    @contextlib.contextmanager
    def _place(self, device: str, transfer: Transfer) -> Iterator[Transfer]:
        places = self._transfers.setdefault(device, [])
        if len(places) == self._max_each:
            places.pop(0).cut_off()
        places.append(transfer)
        try:
            yield transfer
        finally:
            if transfer in places:
                places.remove(transfer)
            if not places and self._transfers.get(device) is places:
                del self._transfers[device]
