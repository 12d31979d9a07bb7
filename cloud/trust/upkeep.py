"""Renews the certificates of a cloud and its broker, or of a region, periodically, while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from sqlalchemy.exc import SQLAlchemyError

from edgefl.errors import EdgeflError
from edgefl.logs import event

LONGEST_S = 60.0  # also the delay until mosquitto rejects a certificate that a device has replaced

_log = logging.getLogger(__name__)


def interval_s(certificate_days: float) -> float:
    """Return the time between checks: several fit into the third of a lifetime that is left at a renewal."""
    return min(LONGEST_S, certificate_days * 86400 / 20)


class Upkeep:
    """Calls `renew` periodically in a thread, and then `reload` in the event loop.

    If the disk is full or the database locked, the error is logged and the call repeated; `reason` has the error until
    then. Any other error is a bug and is passed to `on_failure`.
    """

    def __init__(
        self, renew: Callable[[], object], reload: Callable[[], None], every_s: Callable[[], float],
        on_failure: Callable[[BaseException], object],
    ) -> None:  # fmt: skip
        self._renew, self._reload, self._every_s, self._on_failure = renew, reload, every_s, on_failure
        self._now = asyncio.Event()
        self.reason = ""  # why the last renewal failed; empty if it succeeded

    def look_now(self) -> None:
        """Renew what is due now, without waiting for the next time. Call it in the event loop."""
        self._now.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Renew while the block runs."""
        task = asyncio.create_task(self._repeat(), name="certificates")
        task.add_done_callback(self._note_end)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _repeat(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s()):
                    await self._now.wait()
            self._now.clear()
            try:
                try:
                    await asyncio.to_thread(self._renew)
                finally:
                    self._reload()  # also what was renewed before an error
                self.reason = ""
            except (EdgeflError, OSError, ValueError, SQLAlchemyError) as error:
                self.reason = str(error)
                event(_log, logging.ERROR, "certificates.not_looked_after", reason=error)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)
