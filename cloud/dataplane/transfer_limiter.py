"""Limits how many transfers start at once, without letting slow ones delay the rest.

Two fast transfers use all cores and the disk; ten at once are no faster, and their buffers need five times the
memory. A transfer that is not finished after `turn_s` is limited by its own link: it gives its turn to the next one
and continues in parallel. So a thousand slow devices can upload at the same time.
Invariant: a device has at most `max_each` transfers, and a transfer without progress ends: a device's newest
transfer cuts off its oldest, whose connection is usually dead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

TURNS = 2
TURN_S = 0.5
MAX_INSIDE = 128  # transfers at once, each with one or two megabytes of buffers
STALL_S = 120.0  # a megabyte at 70 kbit/s


class Transfer:
    """One transfer and its deadline. Used in one event loop only."""

    def __init__(self, scope: asyncio.Timeout, stall_s: float) -> None:
        self._scope, self._stall_s = scope, stall_s
        self._cut_off = False
        self._turns: asyncio.Semaphore | None = None  # of which it has one

    def moved(self) -> None:
        """Record progress: restart the deadline, unless the transfer was cut off."""
        if not self._cut_off:
            self._scope.reschedule(asyncio.get_running_loop().time() + self._stall_s)

    def take_turn(self, turns: asyncio.Semaphore) -> None:
        """Hold one of the turns, which was acquired."""
        self._turns = turns

    def pass_turn(self) -> None:
        """Give the turn to the next transfer, if it is not given yet; this one goes on beside it."""
        if self._turns is not None:
            self._turns.release()
            self._turns = None

    def cut_off(self) -> None:
        self._cut_off = True
        self._scope.reschedule(asyncio.get_running_loop().time())


class TransferLimiter:
    """Limits uploads, or downloads. Used in one event loop only."""

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
        """Wait for a turn. It ends with the block, after `turn_s` or when it is passed on, whichever comes first.

        Raises TimeoutError if the transfer does not report progress (`moved`) in time, or is cut off.
        """
        async with asyncio.timeout(None) as scope:
            with self._place(device, Transfer(scope, self._stall_s)) as transfer:
                async with self._inside:
                    await self._turns.acquire()
                    transfer.take_turn(self._turns)
                    timer = asyncio.get_running_loop().call_later(self._turn_s, transfer.pass_turn)
                    transfer.moved()
                    try:
                        yield transfer
                    finally:
                        timer.cancel()
                        transfer.pass_turn()

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
