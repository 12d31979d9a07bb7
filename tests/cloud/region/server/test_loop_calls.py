"""Calls of threads into the loop: their results and errors come back, and none waits for a region that stops."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cloud.region.server.loop_calls import LoopCalls
from edgefl.errors import CloudStopping
from tests.threaded import LoopThread


@pytest.fixture
def loop():
    made = LoopThread("loop calls")
    yield made
    made.close()


async def twice(number):
    return 2 * number


async def failing():
    raise ValueError("no")


def test_results_and_errors_come_back(loop):
    calls = LoopCalls(loop.loop, lambda: False)
    assert calls.wait(twice(4)) == 8
    with pytest.raises(ValueError, match="no"):
        calls.wait(failing())


def test_a_call_ends_when_the_region_stops(loop):
    is_stopping = threading.Event()
    calls, begun, ended = LoopCalls(loop.loop, is_stopping.is_set), threading.Event(), threading.Event()

    async def forever():
        begun.set()
        await asyncio.Event().wait()

    def waiting():
        with pytest.raises(CloudStopping, match="continue at the next start"):
            calls.wait(forever())
        ended.set()

    thread = threading.Thread(target=waiting)
    thread.start()
    assert begun.wait(30)
    is_stopping.set()
    calls.cancel()
    assert ended.wait(30)
    with pytest.raises(CloudStopping):
        calls.wait(forever())  # it comes after the others were ended
    thread.join(30)
