"""gRPC over wires: the real handlers of a servicer, streams both ways, deadlines, cancellation, lost connections."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from edgefl.faults.machine import threads
from edgefl.faults.machine.kernel import Kernel, Node
from edgefl.faults.machine.network import Network
from edgefl.faults.machine.rpc import SimAio
from edgefl.faults.machine.rpc_server import serve


class World:
    def __init__(self, folder):
        self.kernel = Kernel(4)
        threads.enter(self.kernel)
        self.network = Network(self.kernel)
        self.client, self.server = Node(self.kernel, "c", folder), Node(self.kernel, "s", folder)
        self.cancelled, self.seen = [], []
        self.kernel.call_in(self.server, lambda: self.server.loop.create_task(self._serve()))
        self.kernel.run(lambda: False, 0.1)

    async def _serve(self):
        async def double(request, context):
            self.seen.append(context.auth_context()["x509_pem_cert"])
            if request == b"bad":
                context.set_trailing_metadata((("where", "there"),))
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not this")
            try:
                await asyncio.sleep(float(request))
            except asyncio.CancelledError:
                self.cancelled.append(request)
                raise
            return b"%g" % (2 * float(request))

        async def count(request, context):
            for number in range(int(request)):
                await context.write(b"%d" % number)

        async def total(requests, context):
            await context.send_initial_metadata((("receives", "1"),))
            return b"%d" % sum([int(one) async for one in requests])

        async def echo(requests, context):
            async for one in requests:
                await context.write(one)

        methods = {
            "Double": grpc.unary_unary_rpc_method_handler(double),
            "Count": grpc.unary_stream_rpc_method_handler(count),
            "Total": grpc.stream_unary_rpc_method_handler(total),
            "Echo": grpc.stream_stream_rpc_method_handler(echo),
        }
        async with serve(self.network, 9, [grpc.method_handlers_generic_handler("S", methods)]):
            await asyncio.get_running_loop().create_future()

    def run(self, work, limit_s=200.0):
        """Run a coroutine in the client, and return what it returns."""
        done = []

        async def outer():
            try:
                done.append((await work(SimAio(lambda: self.network).secure_channel("h:9", b"a certificate")), None))
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - raised by `run`
                done.append((None, error))

        self.kernel.call_in(self.client, lambda: self.client.loop.create_task(outer()))
        self.kernel.run(lambda: bool(done), self.kernel.now_s + limit_s)
        assert done, "it did not end"
        if done[0][1] is not None:
            raise done[0][1]
        return done[0][0]


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    threads.leave()
    made.kernel.close()


def test_a_call_with_one_request_and_one_reply(world):
    async def work(channel):
        return await channel.unary_unary("/S/Double", None, None)(b"2")

    assert world.run(work) == b"4"
    assert world.seen == [[b"a certificate"]]
    assert world.kernel.now_s > 2


def test_an_abort_has_code_details_and_trailing_metadata(world):
    async def work(channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/S/Double", None, None)(b"bad")
        return caught.value

    error = world.run(work)
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "not this")
    assert dict(error.trailing_metadata()) == {"where": "there"}


def test_a_stream_of_replies_ends(world):
    async def work(channel):
        call = channel.unary_stream("/S/Count", None, None)(b"3")
        return [await call.read() for _ in range(4)]

    assert world.run(work) == [b"0", b"1", b"2", grpc.aio.EOF]


def test_a_stream_of_requests_after_the_servers_metadata(world):
    async def work(channel):
        call = channel.stream_unary("/S/Total", None, None)()
        await call.wait_for_connection()
        await call.write(b"1")
        assert "receives" in await call.initial_metadata()
        await call.write(b"2")
        await call.done_writing()
        reply = await call
        with pytest.raises(asyncio.InvalidStateError):
            await call.write(b"3")
        return reply

    assert world.run(work) == b"3"


def test_two_streams(world):
    async def items():
        for one in (b"a", b"b"):
            yield one

    async def work(channel):
        return [one async for one in channel.stream_stream("/S/Echo", None, None)(items())]

    assert world.run(work) == [b"a", b"b"]


def test_a_deadline_ends_the_call_at_both_ends(world):
    async def work(channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/S/Double", None, None)(b"50", timeout=3.0)
        await asyncio.sleep(1)
        return caught.value.code()

    assert world.run(work) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert world.cancelled == [b"50"]


def test_a_cancelled_call_raises_cancelled_and_ends_at_the_server(world):
    async def work(channel):
        call = channel.unary_unary("/S/Double", None, None)(b"50")
        await asyncio.sleep(1)
        assert call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.sleep(1)
        return call.done() and call.cancelled()

    assert world.run(work)
    assert world.cancelled == [b"50"]


def test_a_lost_connection_ends_its_calls_and_the_next_one_connects_again(world):
    async def work(channel):
        double = channel.unary_unary("/S/Double", None, None)
        call = double(b"50")
        await asyncio.sleep(1)
        world.network.break_link("c", "s")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        return await double(b"1")

    assert world.run(work) == b"2"
    assert world.cancelled == [b"50"]


def test_without_a_server_a_call_fails_or_waits(world):
    world.kernel.kill(world.server)

    async def work(channel):
        double = channel.unary_unary("/S/Double", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await double(b"1")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await double(b"1", wait_for_ready=True)
        waiting = double(b"1", wait_for_ready=True)
        asyncio.get_running_loop().call_later(1.0, waiting.cancel)
        with pytest.raises(asyncio.CancelledError):
            await waiting.wait_for_connection()
        return channel.get_state()

    assert world.run(work) is not grpc.ChannelConnectivity.READY
    assert world.kernel.num_steps < 500  # it does not spin


def test_a_closed_channel_wakes_who_watches_it(world):
    async def work(channel):
        state = channel.get_state(try_to_connect=True)
        asyncio.get_running_loop().call_later(1.0, lambda: asyncio.ensure_future(channel.close()))
        states = []
        try:
            while True:
                await channel.wait_for_state_change(state)
                states.append(state := channel.get_state())
        except grpc.aio.UsageError:
            return states

    assert grpc.ChannelConnectivity.READY in world.run(work)
