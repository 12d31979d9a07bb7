"""Who holds connections to the gRPC port: its table by hand, and a real server with strangers at its door."""

import asyncio
import contextlib
import logging
import socket

import grpc
import pytest

from cloud.dataplane.grpc_port import (
    CONNECTIONS_OF_A_DEVICE,
    DATA_PLANE_PACE,
    Found,
    GrpcPort,
    Scanner,
    parse_peer,
    shut,
)
from cloud.shares import PortShare
from edgefl.protocols import tls


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def shuts(monkeypatch):
    """Collect the ports of connections that are shut, instead of shutting numbers that are not sockets here."""
    found = []
    monkeypatch.setattr("cloud.dataplane.grpc_port.shut", lambda one: found.append(one.peer[1]))
    return found


def make(seats=3, waiting=2, clock=None):
    return GrpcPort(PortShare(seats=seats, waiting=waiting), 9440, "the cloud is full", clock or Clock())


def found(number):
    return Found(number, 1000 + number, ("192.0.2.1", number))


def peer(number):
    return f"ipv4:192.0.2.1:{number}"


def test_strangers_beyond_the_limit_are_shut_the_oldest_first_and_those_who_called_are_not(shuts):
    port = make()
    assert port.admit("cam-1", peer(1)) == ""  # before its connection was found
    port.update([found(n) for n in (1, 2, 3, 4)], [])
    assert shuts == [2]
    assert port.admit("cam-2", peer(3)) == ""  # after
    port.update([found(5), found(6)], [found(2)])
    assert shuts == [2, 4]


def test_a_connection_without_an_admitted_call_has_a_deadline(shuts):
    clock = Clock()
    port = make(clock=clock)
    port.update([found(1), found(2)], [])
    port.admit("cam-1", peer(1))
    clock.now_s = 20.0
    port.update([], [])
    assert shuts == [2]
    clock.now_s = 1000.0
    port.update([], [])
    assert shuts == [2]


def test_who_finds_no_seat_is_told_and_gets_one_when_it_is_free(shuts, caplog):
    port = make(seats=2)
    port.update([found(1), found(2)], [])
    assert [port.admit(f"cam-{n}", peer(n)) for n in (1, 2)] == ["", ""]
    port.update([found(3)], [])
    with caplog.at_level(logging.WARNING):
        assert port.admit("cam-3", peer(3)) == "the cloud is full"
    assert caplog.messages == ["device.no_seat device=cam-3 seats=2"]
    assert port.admit("cam-1", peer(1)) == ""
    port.update([], [found(1)])
    assert port.admit("cam-3", peer(3)) == ""


def test_a_device_that_comes_back_takes_its_own_seat_in_a_full_cloud(shuts):
    port = make(seats=1)
    port.update([found(1)], [])
    port.admit("cam-1", peer(1))
    port.update([found(2)], [])
    assert port.admit("cam-1", peer(2)) == ""
    port.update([], [])
    assert shuts == [1]


def test_a_device_has_few_connections_its_newest(shuts):
    port = make(seats=100, waiting=50)
    numbers = range(1, CONNECTIONS_OF_A_DEVICE + 3)
    port.update([found(n) for n in numbers], [])
    assert all(port.admit("cam-1", peer(n)) == "" for n in numbers)
    port.update([], [])
    assert shuts == [1, 2]


def test_a_seat_whose_connection_was_never_found_is_given_back(shuts):
    port = make(seats=1)
    port.admit("cam-1", peer(1))
    for _ in range(3):
        port.update([], [])
    assert port.admit("cam-2", peer(2)) == ""


def test_calls_of_a_device_are_paced_and_others_are_not():
    port = make()
    assert max(port.pace("cam-1") for _ in range(int(DATA_PLANE_PACE.burst))) == pytest.approx(0.0)
    assert port.pace("cam-1") == pytest.approx(1 / DATA_PLANE_PACE.per_s)
    assert port.pace("cam-2") == 0.0


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("ipv4:127.0.0.1:5", ("127.0.0.1", 5)),
        ("ipv6:%5B::1%5D:5", ("::1", 5)),
        ("ipv6:[::ffff:127.0.0.1]:5", ("127.0.0.1", 5)),
        ("unix:", ("", 0)),
    ],
)
def test_peers_are_parsed(text, parsed):
    assert parse_peer(text) == parsed


def test_the_scanner_finds_accepted_connections_of_its_port_and_shut_ends_them():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        scanner = Scanner(listener.getsockname()[1])
        assert scanner.scan() == ([], [])
        with socket.create_connection(listener.getsockname()) as client, socket.create_connection(other.getsockname()):
            accepted, elsewhere = listener.accept()[0], other.accept()[0]
            with accepted, elsewhere:
                (one,), gone = scanner.scan()
                assert (one.descriptor, one.peer, gone) == (accepted.fileno(), client.getsockname(), [])
                assert scanner.scan() == ([], [])
                shut(Found(elsewhere.fileno(), one.inode, one.peer))  # its number is another's by now
                elsewhere.sendall(b"still here")
                shut(one)
                assert client.recv(1) == b""
        assert scanner.scan() == ([], [one])
        shut(one)


def test_a_real_server_rids_itself_of_strangers_and_serves_devices(fleet_ca):
    async def hello(_request, context):
        return port.admit("cam-1", context.peer()).encode()

    async def main():
        nonlocal port
        with socket.create_server(("127.0.0.1", 0)) as free:
            number = free.getsockname()[1]
        port = GrpcPort(PortShare(seats=4, waiting=8), number, "full", asyncio.get_running_loop().time)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *port.options])
        handlers = {"Hello": grpc.unary_unary_rpc_method_handler(hello)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
        server.add_secure_port(f"127.0.0.1:{number}", tls.grpc_server_credentials(fleet_ca.cloud))
        await server.start()
        watch = asyncio.create_task(port.watch())
        strangers = [await asyncio.open_connection("127.0.0.1", number) for _ in range(60)]
        ends = {asyncio.create_task(reader.read()) for reader, _ in strangers}
        credentials = tls.grpc_channel_credentials(fleet_ca.device("cam-1"))
        async with asyncio.timeout(60), grpc.aio.secure_channel(f"127.0.0.1:{number}", credentials) as channel:
            call = channel.unary_unary("/t.T/Hello")
            assert await call(b"", wait_for_ready=True, timeout=50) == b""
            while len(ends) > 8:
                _, ends = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            assert await call(b"", timeout=50) == b""  # over the same connection
        for task in ends:
            task.cancel()
        for _, writer in strangers:
            writer.close()
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        await server.stop(0)

    port = None
    asyncio.run(main())


def test_a_removed_devices_connections_are_closed_at_the_next_scan(shuts):
    port = make()
    for number, device in ((1, "cam-1"), (2, "cam-2"), (3, "cam-1")):
        assert port.admit(device, peer(number)) == ""
    port.update([found(n) for n in (1, 2, 3)], [])
    port.drop("cam-1")
    port.drop("ghost")
    port.update([], [])
    assert sorted(shuts) == [1, 3]


def test_calls_of_all_seats_at_once_are_answered():
    """A round of a large fleet: gRPC would cancel some of more than 1,000 calls that wait to be accepted."""

    async def echo(request, _context):
        return request

    async def run():
        server = grpc.aio.server(options=make(seats=2000).options)
        methods = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", methods),))
        number = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        own = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(server.stop, None)
            calls = []
            for _ in range(100):
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{number}", options=own)
                calls.append((await opened.enter_async_context(channel)).unary_unary("/t/Echo"))
            await asyncio.gather(*(call(b"connected", wait_for_ready=True) for call in calls))
            return await asyncio.gather(*(call(b"x") for call in calls for _ in range(30)))

    assert asyncio.run(run()) == [b"x"] * 3000
