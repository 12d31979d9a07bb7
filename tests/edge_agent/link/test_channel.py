"""The gRPC channel: mutual TLS, and when the cloud is reachable."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading

import grpc
import pytest

from edge_agent.link.channel import CloudChannel
from edge_agent.link.profile import load_profile
from edgefl.protocols import tls
from edgefl.protocols.ports import client_channel


def over(home, function):
    async def inside():
        channel = CloudChannel(load_profile(home), home)
        try:
            async with asyncio.timeout(20):
                return await function(channel)
        finally:
            await channel.close()

    return asyncio.run(inside())


def test_the_cloud_knows_us_by_our_certificate(fleet, home):
    over(home, lambda channel: channel.next("0.1"))
    assert fleet.calls == ["next cam-1"]


def test_a_certificate_of_another_ca_is_turned_away(home, strange_ca):
    identity = tls.Identity.in_folder(home)
    identity.cert.write_bytes(tls.sign_request(strange_ca.folder, tls.new_request(identity, "cam-1"), "cam-1"))
    with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
        over(home, lambda channel: channel.next("0.1"))


def test_a_cloud_of_another_ca_is_not_spoken_to(fleet, home, strange_ca):
    (home / "ca.pem").write_bytes(strange_ca.cloud.ca.read_bytes())
    with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
        over(home, lambda channel: channel.next("0.1"))
    assert fleet.calls == []


def test_tls_is_1_3(fleet, home):
    context = tls.client_context(home / "ca.pem", tls.Identity.in_folder(home))
    context.set_alpn_protocols(["h2"])

    with (
        socket.create_connection(("127.0.0.1", fleet.port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        assert secure.version() == "TLSv1.3"
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3


def test_each_return_of_the_cloud_is_told_once(fleet, home, until):
    async def run(channel):
        told = []
        watching = asyncio.create_task(channel.watch(lambda: told.append(channel.reachable)))
        for number in (1, 2):
            await until(lambda number=number: len(told) == number)
            await channel.next("0.1")
            assert told == [True] * number
            await asyncio.to_thread(fleet.stop)
            await until(lambda: not channel.reachable)
            if number == 1:
                await asyncio.to_thread(fleet.start)
        watching.cancel()

    over(home, run)


def test_insecure_names_the_device_in_its_metadata(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from edge_agent.link.profile import Profile
    from edgefl.protocols import fleet_pb2 as pb
    from edgefl.protocols import fleet_pb2_grpc

    class Open(fleet_pb2_grpc.FleetServicer):
        def Next(self, _request, context):  # noqa: N802 - gRPC's name
            return pb.NextReply(broker=dict(context.invocation_metadata())["edgefl-device"])

    server = grpc.server(ThreadPoolExecutor(1))
    fleet_pb2_grpc.add_FleetServicer_to_server(Open(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    profile = Profile(device="cam-9", cloud_url="http://127.0.0.1:1", grpc=f"127.0.0.1:{port}", broker="mqtt://x:1")

    async def run():
        channel = CloudChannel(profile, tmp_path)
        reply = await channel.next("0.1")
        await channel.close()
        return reply.broker

    assert asyncio.run(run()) == "cam-9"
    server.stop(None).wait(5)


def test_a_channel_that_is_reopened_shows_the_new_certificate_and_ends_what_was_under_way(fleet, home, until):
    ref = fleet.blob(bytes(3 << 20))
    gate = threading.Event()
    fleet.before_chunk = lambda _way, offset: gate.wait(20) if offset else None

    async def run(channel):
        told = []
        watching = asyncio.create_task(channel.watch(lambda: told.append(1)))
        await channel.next("0.1")
        under_way = channel.download(ref.sha256, 0)
        received = len((await under_way.read())[3:])
        identity = tls.Identity.in_folder(home)
        identity.cert.write_bytes(tls.sign_request(fleet.folder, tls.new_request(identity, "cam-1"), "cam-1"))
        await channel.reopen()
        await channel.next("0.1")
        gate.set()
        while isinstance(message := await under_way.read(), bytes):
            received += len(message)
        await until(lambda: channel.reachable)
        watching.cancel()
        return received

    assert over(home, run) >= 3 << 20
    assert len(set(fleet.serials)) == 2


@pytest.mark.parametrize("begun", [True, False], ids=["its end has begun", "its end is not at work yet"])
def test_closing_closes_a_former_channel_too_whatever_is_under_way(fleet, home, begun):
    ref = fleet.blob(bytes(3 << 20))
    gate = threading.Event()
    fleet.before_chunk = lambda _way, offset: gate.wait(20) if offset else None

    async def run(channel):
        watching = asyncio.create_task(channel.watch(lambda: None))
        under_way = channel.download(ref.sha256, 0)
        await under_way.read()
        former = channel._channel
        await channel.reopen()
        if begun:
            await channel.next("0.1")
        watching.cancel()
        await channel.close()
        state = former.get_state()
        await former.close()  # does nothing but where the test fails, which is to end, too
        return state, await under_way.code()

    try:
        state, code = over(home, run)
    finally:
        gate.set()
    assert state is grpc.ChannelConnectivity.SHUTDOWN
    assert code is grpc.StatusCode.CANCELLED


def test_a_former_channel_whose_calls_do_not_end_is_closed_in_time(fleet, home, until, monkeypatch):
    monkeypatch.setattr(client_channel, "TRANSFER_S", 0.05)
    ref = fleet.blob(bytes(3 << 20))
    gate = threading.Event()
    fleet.before_chunk = lambda _way, offset: gate.wait(20) if offset else None

    async def run(channel):
        under_way = channel.download(ref.sha256, 0)
        await under_way.read()
        former = channel._channel
        await channel.reopen()
        await until(lambda: former.get_state() is grpc.ChannelConnectivity.SHUTDOWN)
        await channel.next("0.1")
        return await under_way.code()

    try:
        assert over(home, run) is grpc.StatusCode.CANCELLED
    finally:
        gate.set()
