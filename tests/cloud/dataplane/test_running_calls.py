"""A device's calls end at once, with a reason, and nobody else's."""

import asyncio

import grpc
import pytest

from cloud.dataplane.running_calls import RunningCalls


class Refused(Exception):
    pass


class Context:
    async def abort(self, code, reason):
        assert code is grpc.StatusCode.PERMISSION_DENIED
        raise Refused(reason)


class Service:
    """Calls that name their device and wait; `begun` counts them."""

    def __init__(self):
        self.calls, self.begun = RunningCalls(), asyncio.Semaphore(0)

    async def method(self, device, _context):
        self.calls.note(device)
        self.begun.release()
        await asyncio.get_running_loop().create_future()

    async def start(self, *devices):
        call = self.calls.registered(self.method)
        tasks = [asyncio.create_task(call(device, Context())) for device in devices]
        for _ in devices:
            await self.begun.acquire()
        return tasks


def test_the_calls_of_one_device_are_cut_with_a_reason():
    async def run():
        service = Service()
        first, second, other = await service.start("a", "a", "b")
        assert service.calls.devices() == {"a", "b"}
        service.calls.cut("a", "removed")
        for task in (first, second):
            with pytest.raises(Refused, match="removed"):
                await task
        assert not other.done()
        other.cancel()
        with pytest.raises(asyncio.CancelledError):  # by its own client: no reason is made up
            await other

    asyncio.run(run())


def test_a_call_that_has_ended_is_not_cut():
    async def run():
        calls = RunningCalls()

        async def method(device, _context):
            calls.note(device)
            return "answer"

        assert await calls.registered(method)("a", Context()) == "answer"
        calls.cut("a", "removed")
        await asyncio.sleep(0)

    asyncio.run(run())
