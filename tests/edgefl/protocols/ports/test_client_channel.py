"""Channels of clients: the name that they expect, and the end of one that is replaced."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from edgefl.errors import ParentLeft
from edgefl.protocols.ports import client_channel
from edgefl.protocols.ports.client_channel import answered, close_after, connected, open_channel
from edgefl.protocols.tls import Identity, grpc_server_credentials, new_request, sign_request


class Server:
    """A gRPC server whose calls answer when the test says so."""

    def __init__(self, identity):
        self._server = grpc.server(ThreadPoolExecutor(4))
        method = grpc.unary_unary_rpc_method_handler(lambda request, _context: request)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"Echo": method}),))
        credentials = grpc_server_credentials(identity)
        self.target = f"127.0.0.1:{self._server.add_secure_port('127.0.0.1:0', credentials)}"
        self._server.start()

    def stop(self):
        self._server.stop(None).wait()


@pytest.fixture
def server(fleet_ca):
    made = Server(fleet_ca.cloud)
    yield made
    made.stop()


@pytest.fixture
def own(fleet_ca):
    return fleet_ca.device("cam-1")


def test_a_server_is_known_by_its_address_or_by_the_name_that_is_expected(server, own):
    async def echo(server_name):
        channel = open_channel(server.target, own, server_name)
        try:
            return await channel.unary_unary("/t/Echo")(b"x", timeout=20)
        finally:
            await channel.close(None)

    assert asyncio.run(echo("")) == b"x"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        asyncio.run(echo("oslo.region.edgefl.internal"))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_region_is_known_by_its_name(fleet_ca, own, tmp_path):
    identity = Identity(tmp_path / "key.pem", tmp_path / "cert.pem", fleet_ca.cloud.ca)
    request = new_request(identity, "oslo")
    identity.cert.write_bytes(sign_request(fleet_ca.folder, request, "oslo", domain=".region.edgefl.internal"))
    region = Server(identity)

    async def echo():
        channel = open_channel(region.target, own, "oslo.region.edgefl.internal")
        try:
            return await channel.unary_unary("/t/Echo")(b"x", timeout=20)
        finally:
            await channel.close(None)

    assert asyncio.run(echo()) == b"x"
    region.stop()


def test_a_replaced_channel_is_closed_after_its_calls_and_in_time(own, monkeypatch):
    monkeypatch.setattr(client_channel, "TRANSFER_S", 0.05)

    async def run():
        channel = open_channel("127.0.0.1:1", own)  # nobody is there: the call waits
        call = channel.unary_unary("/t/Echo")(b"x", wait_for_ready=True)
        waiting = asyncio.create_task(answered(call))
        await asyncio.sleep(0)
        await close_after(channel, [call])
        with pytest.raises(ParentLeft):
            await waiting
        assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN

    asyncio.run(run())


def test_a_task_that_is_cancelled_itself_is_not_told_otherwise(own):
    async def run():
        channel = open_channel("127.0.0.1:1", own)
        task = asyncio.create_task(answered(channel.unary_unary("/t/Echo")(b"x", wait_for_ready=True)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await channel.close(None)

    asyncio.run(run())


def test_a_call_without_a_connection_ends_with_its_channel(own):
    async def run():
        channel = open_channel("127.0.0.1:1", own)
        call = channel.stream_unary("/t/Echo")(wait_for_ready=True)
        waiting = asyncio.create_task(connected(call))
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(ParentLeft):
            await waiting
        await channel.close(None)

    asyncio.run(run())
