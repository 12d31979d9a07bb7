"""The server's side: the real handler of a method, replies that are noted, errors that no servicer should raise."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from edgefl.faults.machine import threads
from edgefl.faults.machine.kernel import Kernel, Node
from edgefl.faults.machine.network import Network
from edgefl.faults.machine.rpc import SimAio
from edgefl.faults.machine.rpc_server import serve


@pytest.fixture
def world(tmp_path):
    kernel = Kernel(8)
    threads.enter(kernel)
    network = kernel.network = Network(kernel)
    kernel.client, server = Node(kernel, "c", tmp_path), Node(kernel, "s", tmp_path)

    async def work(request, context):
        if request == b"bug":
            raise ZeroDivisionError
        return request + b"!"

    async def run():
        methods = {"Work": grpc.unary_unary_rpc_method_handler(work)}
        async with serve(network, 9, [grpc.method_handlers_generic_handler("S", methods)]):
            await asyncio.get_running_loop().create_future()

    kernel.call_in(server, lambda: server.loop.create_task(run()))
    yield kernel
    threads.leave()
    kernel.close()


def ask(world, request):
    done = []

    async def call():
        channel = SimAio(lambda: world.network).secure_channel("h:9", b"")
        try:
            done.append(await channel.unary_unary("/S/Work", None, None)(request, wait_for_ready=True))
        except grpc.aio.AioRpcError as error:
            done.append(error.code())

    world.call_in(world.client, lambda: world.client.loop.create_task(call()))
    world.run(lambda: bool(done), 10.0)
    return done[0]


def test_a_reply_is_noted_when_it_leaves(world):
    seen = []
    world.network.on_reply = lambda *said: seen.append(said)
    assert ask(world, b"hello") == b"hello!"
    assert seen == [("s", "c", "/S/Work", b"hello", b"hello!")]


def test_an_error_that_no_servicer_should_raise_is_a_problem(world):
    assert ask(world, b"bug") is grpc.StatusCode.UNKNOWN
    assert "/S/Work at s raised ZeroDivisionError" in world.problems[0]
