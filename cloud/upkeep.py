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


@contextlib.asynccontextmanager
async def looked_after(look: Callable[[], bool], reload: Callable[[], None], every_s: float) -> AsyncIterator[None]:
    """Call `look` now and then in a thread, while the block runs, and `reload` in this loop where it says so.

    A look that fails, for a full disk or a database that is held, is logged and comes again.
    """
    task = asyncio.create_task(_repeat(look, reload, every_s), name="certificates")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _repeat(look: Callable[[], bool], reload: Callable[[], None], every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            if await asyncio.to_thread(look):
                reload()
        except (EdgeflError, OSError, ValueError, SQLAlchemyError) as error:
            event(_log, logging.ERROR, "certificates.not_looked_after", reason=error)
