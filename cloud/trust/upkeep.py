"""What the cloud does by a timer: looks after its certificates and those of its broker, while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from sqlalchemy.exc import SQLAlchemyError

from edgefl.errors import EdgeflError
from edgefl.logs import event

LONGEST_S = 60.0  # also: how soon a certificate that a device has renewed is revoked at mosquitto

_log = logging.getLogger(__name__)


def interval_s(certificate_days: float) -> float:
    """Return how often to look: often enough within the third of a lifetime that is left at a renewal."""
    return min(LONGEST_S, certificate_days * 86400 / 20)


class Upkeep:
    """Calls `look` now and then in a thread, and after it `reload` in the event loop.

    A look that fails, for a full disk or a database that is held, is logged and comes again; `reason` says why
    meanwhile. Any other error is a fault of ours, and `ended` hears of it.
    """

    def __init__(
        self, look: Callable[[], object], reload: Callable[[], None], every_s: float,
        ended: Callable[[BaseException], object],
    ) -> None:  # fmt: skip
        self._look, self._reload, self._every_s, self._ended = look, reload, every_s, ended
        self.reason = ""  # why certificates are not looked after; empty while they are

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look while the block runs."""
        task = asyncio.create_task(self._repeat(), name="certificates")
        task.add_done_callback(self._note_end)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                try:
                    await asyncio.to_thread(self._look)
                finally:
                    self._reload()  # also what a look made before it failed
                self.reason = ""
            except (EdgeflError, OSError, ValueError, SQLAlchemyError) as error:
                self.reason = str(error)
                event(_log, logging.ERROR, "certificates.not_looked_after", reason=error)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._ended(error)
