"""Processes that are started again: real ones that end at once, live, or cannot be started."""

from __future__ import annotations

import asyncio

import pytest

from cloud.beside.restarted import STOPPED, RestartedProcess
from edgefl.process.children import Child


class Kept(RestartedProcess[None]):
    """Runs `python -m MODULE`, and notes how it ended."""

    def __init__(self, *modules) -> None:
        super().__init__()
        self._modules, self.ends, self.number = list(modules), [], 0
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    async def _run_child(self) -> None:
        module = self._modules[min(self.number, len(self._modules) - 1)]
        self.number += 1
        if module is None:
            raise OSError("no descriptor is left")
        child = Child(*module)
        self._begin(child)
        self.begun.set()
        try:
            await self._ended(child)
        finally:
            self._note_down(self._why_ended(child))

    def _note_down(self, reason) -> None:
        self._child = None
        self.begun.clear()
        self.ends.append(reason)
        self.ended.set()

    async def has_ended(self, times) -> None:
        while len(self.ends) < times:
            self.ended.clear()
            await self.ended.wait()


LIVES = ("http.server", "0", "--bind", "127.0.0.1")


def test_it_is_started_again_whatever_ended_it() -> None:
    async def run():
        kept = Kept(("this",), None, LIVES)
        running = asyncio.create_task(kept.run())
        async with asyncio.timeout(60):
            await kept.has_ended(2)
            assert kept.ends == ["its process ended with exit status 0", "it cannot be started: no descriptor is left"]
            await kept.begun.wait()
            kept._kill("a batch took longer than 9 s")
            await kept.has_ended(3)
        assert kept.ends[2] == "a batch took longer than 9 s"
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(run())


def test_a_stop_ends_the_process() -> None:
    async def run():
        kept = Kept(LIVES)
        running = asyncio.create_task(kept.run())
        await asyncio.wait_for(kept.begun.wait(), 60)
        child = kept._child
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert child.ended.is_set()
        assert kept.ends == [STOPPED]

    asyncio.run(run())
