"""Which devices the fleet has, for a process beside the cloud: by the cloud's database, asked at most once a second.

A removed device gets no new call after that second, and its open streams are ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

from sqlalchemy.exc import SQLAlchemyError

from edgefl.logs import event

FRESH_S = 1.0
_MAX_SEEN = 10_000  # answers

_log = logging.getLogger(__name__)


class KnownDevices:
    """Asks `is_known`, which blocks, and remembers the answers for FRESH_S."""

    def __init__(self, is_known: Callable[[str, str | None], bool], clock: Callable[[], float]) -> None:
        self._is_known, self._clock = is_known, clock
        self._seen_s: dict[tuple[str, str | None], float] = {}
        self._serials: dict[str, str | None] = {}  # last seen, by device

    def was_known(self, device: str, serial: str | None) -> bool:
        """Whether this device with this certificate was known a moment ago."""
        return self._clock() - self._seen_s.get((device, serial), float("-inf")) < FRESH_S

    def is_known(self, device: str, serial: str | None) -> bool:
        """Whether it is known now. Call it in any thread."""
        known = self._is_known(device, serial)
        if known:
            if len(self._seen_s) >= _MAX_SEEN:
                self._seen_s.clear()
            self._seen_s[device, serial] = self._clock()
            self._serials[device] = serial
        else:
            self._seen_s.pop((device, serial), None)
            if self._serials.get(device, "") == serial:  # not for another certificate than the one in use
                del self._serials[device]
        return known

    async def watch(self, busy: Callable[[], Iterable[str]], gone: Callable[[str], object], workers: Executor) -> None:
        """Look once a second whether the devices with running calls are still known, and report those that are not."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(FRESH_S)
            for device in set(busy()) & self._serials.keys():
                try:
                    known = await loop.run_in_executor(workers, self.is_known, device, self._serials.get(device))
                except SQLAlchemyError as error:  # the database is busy: look again in a second
                    event(_log, logging.WARNING, "devices.not_checked", device=device, reason=error)
                    continue
                if not known:
                    event(_log, logging.INFO, "device.removed", device=device)
                    gone(device)
