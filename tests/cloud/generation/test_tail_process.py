"""The process of a tail: real ones that are started, killed, stuck or cannot load; on numpy, without torch."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest

from cloud.generation.tail_process import TailProcess, TailSpec
from cloud.generation.wire import RunStep, StepItem
from edgefl.errors import ProtocolError
from tests.language_models import write_stages

ITEM = StepItem(key=1, num=1, datatype="FP32", position=0, room=9, wants_token=True)
STEP = RunStep(step=1, items=[ITEM], drop=[])
BODY = np.ones((1, 32), np.float32).tobytes()


class Heard:
    """Notes what the process says."""

    def __init__(self) -> None:
        self.events = asyncio.Queue()

    def came_up(self) -> None:
        self.events.put_nowait("up")

    def done(self, result) -> None:
        self.events.put_nowait(result)

    def lost(self, reason) -> None:
        self.events.put_nowait(reason)


def run(test, folder, **spec):
    async def main():
        heard = Heard()
        process = TailProcess(TailSpec(folder=folder, engine="numpy", **spec), heard)
        running = asyncio.create_task(process.run())
        try:
            await test(process, heard.events)
        finally:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    asyncio.run(main())


@pytest.fixture
def folder(tmp_path):
    write_stages(tmp_path, 2)
    return tmp_path / "tail"


def test_a_killed_process_is_told_and_the_next_one_computes(folder) -> None:
    async def test(process, events):
        await process.first_load
        assert await events.get() == "up"
        process.send(STEP, BODY)
        first = await events.get()
        assert first.errors == [""]
        os.kill(process.pid, signal.SIGKILL)
        assert "was killed by SIGKILL" in await events.get()
        assert not process.is_up
        with pytest.raises(RuntimeError, match="is not up"):
            process.send(STEP, BODY)
        assert await events.get() == "up"
        process.send(STEP, BODY)
        assert (await events.get()).tokens == first.tokens

    run(test, folder)


def test_a_step_that_hangs_ends_the_process(folder) -> None:
    async def test(process, events):
        await process.first_load
        await events.get()
        os.kill(process.pid, signal.SIGSTOP)
        process.send(STEP, BODY)
        assert await events.get() == "a step took longer than 0.5 s"

    run(test, folder, run_s=0.5)


def test_a_stage_that_cannot_be_loaded_is_told(tmp_path) -> None:
    async def test(process, _events):
        with pytest.raises(ProtocolError, match=r"the tail does not start: it cannot be loaded: .* is not a stage"):
            await process.first_load

    run(test, tmp_path)
