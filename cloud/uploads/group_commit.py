"""Work of several calls that a thread does together: what came while the last batch was done is the next one.

Databases commit like this (group commit, DeWitt et al. 1984): a commit, and handing work to a thread, cost as much for
many small pieces as for one. One that comes alone does not wait.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")

MAX_BATCH = 32  # pieces, so that none waits long for the others


class GroupCommit(Generic[_T, _R]):
    """Has `work` do what is submitted, in a worker, one batch at a time. Used in one event loop only.

    `work` returns a result for each piece, in their order; an exception among them is raised for that piece alone.
    """

    def __init__(self, work: Callable[[Sequence[_T]], Sequence[_R | Exception]], workers: Executor) -> None:
        self._work, self._workers = work, workers
        self._waiting: deque[tuple[_T, asyncio.Future[_R]]] = deque()
        self._is_running = False

    async def submit(self, piece: _T) -> _R:
        """Return the result of a piece; if the caller is cancelled, it may be done all the same."""
        settled: asyncio.Future[_R] = asyncio.get_running_loop().create_future()
        self._waiting.append((piece, settled))
        self._start()
        return await settled

    def _start(self) -> None:
        if self._is_running or not self._waiting:
            return
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
        try:
            done = asyncio.get_running_loop().run_in_executor(self._workers, self._work, [piece for piece, _ in batch])
        except RuntimeError as error:  # no thread, or none any more
            for _, settled in batch:
                if not settled.done():
                    settled.set_exception(error)
            return
        self._is_running = True
        done.add_done_callback(functools.partial(self._settle, batch))

    def _settle(
        self, batch: Sequence[tuple[_T, asyncio.Future[_R]]], done: asyncio.Future[Sequence[_R | Exception]]
    ) -> None:
        self._is_running = False
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        results: Sequence[_R | BaseException] = [error] * len(batch) if error is not None else done.result()
        for (_, settled), result in zip(batch, results, strict=True):
            if settled.done():  # its caller was cancelled
                continue
            if isinstance(result, asyncio.CancelledError):
                settled.cancel()
            elif isinstance(result, BaseException):
                settled.set_exception(result)
            else:
                settled.set_result(result)
        self._start()
