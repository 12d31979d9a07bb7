"""Calls that threads make in the event loop and wait for; they end when the region stops."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from edgefl.errors import CloudStopping

_T = TypeVar("_T")


class LoopCalls:
    """The calls of all threads into one loop. Methods may be called from any thread, `wait` not in the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, is_stopping: Callable[[], bool]) -> None:
        self._loop, self._is_stopping = loop, is_stopping
        self._running: set[Future[Any]] = set()

    def wait(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Return what a call in the event loop returns; raises CloudStopping if the region stops first."""
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        self._running.add(future)
        try:
            if self._is_stopping():
                future.cancel()
            return future.result()
        except CancelledError as cause:
            raise CloudStopping("the region is stopping; its rounds continue at the next start") from cause
        finally:
            self._running.discard(future)

    def cancel(self) -> None:
        """End all calls."""
        for call in list(self._running):
            call.cancel()
