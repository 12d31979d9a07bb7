"""Which devices the fleet has: by the database, whose answer about a certificate is used for some time.

A process beside the cloud asks at most once a second: a removed device gets no new call after that second, and its open
streams are ended. The cloud itself and a region, which hear of a removal, `forget` the device at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

from sqlalchemy.exc import SQLAlchemyError

from edgefl.logs import event

FRESH_S = 1.0
_MAX_SEEN = 100_000  # devices

_log = logging.getLogger(__name__)


class KnownDevices:
    """Asks `is_known`, which blocks, and remembers a yes for `fresh_s`, for one certificate of each device."""

    def __init__(
        self, is_known: Callable[[str, str | None], bool], clock: Callable[[], float], fresh_s: float = FRESH_S
    ) -> None:
        self._is_known, self._clock, self._fresh_s = is_known, clock, fresh_s
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[str | None, float]] = {}  # device -> serial number of its certificate, and when
        self._num_forgotten = 0

    def was_known(self, device: str, serial: str | None) -> bool:
        """Whether this device with this certificate was known a moment ago."""
        seen = self._seen.get(device)
        return seen is not None and seen[0] == serial and self._clock() - seen[1] < self._fresh_s

    def is_known(self, device: str, serial: str | None) -> bool:
        """Whether it is known now. Call it in any thread."""
        before = self._num_forgotten
        known = self._is_known(device, serial)
        with self._lock:
            if known and before == self._num_forgotten:  # else it may be the device that was removed meanwhile
                self._seen.pop(device, None)  # so that the first one is the one that was asked for longest ago
                if len(self._seen) >= _MAX_SEEN:
                    del self._seen[next(iter(self._seen))]
                self._seen[device] = serial, self._clock()
            elif not known and self._seen.get(device, ("", 0.0))[0] == serial:
                del self._seen[device]  # not for another certificate than the one in use
        return known

    def forget(self, device: str) -> None:
        """Ask again at the device's next call. Call it in any thread, after the device was removed."""
        with self._lock:
            self._num_forgotten += 1
            self._seen.pop(device, None)

    async def watch(self, busy: Callable[[], Iterable[str]], gone: Callable[[str], object], workers: Executor) -> None:
        """Look once a second whether the devices with running calls are still known, and report those that are not."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(FRESH_S)
            for device in set(busy()).intersection(list(self._seen)):
                serial, _ = self._seen.get(device, (None, 0.0))
                try:
                    known = await loop.run_in_executor(workers, self.is_known, device, serial)
                except SQLAlchemyError as error:  # the database is busy: look again in a second
                    event(_log, logging.WARNING, "devices.not_checked", device=device, reason=error)
                    continue
                if not known:
                    event(_log, logging.INFO, "device.removed", device=device)
                    gone(device)
