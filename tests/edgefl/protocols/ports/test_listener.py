"""Connections are counted before TLS, and those that say nothing make room."""

import asyncio
import contextlib
import errno
import gc
import logging
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from edgefl.errors import ConfigError
from edgefl.protocols import tls
from edgefl.protocols.ports.connections import ConnectionLimits, Connections
from edgefl.protocols.ports.listener import Listener, Port, listen

LIMITS = ConnectionLimits(max_open=20, max_waiting=4, waiting_s=30.0)


class Echo(asyncio.Protocol):
    def __init__(self, place):
        self.place = place

    def connection_made(self, transport):
        self.transport = transport
        self.place.serve()

    def data_received(self, data):
        self.transport.write(data)

    def connection_lost(self, exc):
        self.place.leave()


@contextlib.asynccontextmanager
async def listening(context=None, limits=LIMITS, listens=None):
    held = Connections(limits, asyncio.get_running_loop().time)
    listens = listens or socket.create_server(("127.0.0.1", 0))
    port = Port(name="test", socket=listens, context=(lambda: context) if context else None)
    listener = Listener(port, held, Echo)
    listener.start()
    try:
        yield listener.port_number, held
    finally:
        listener.close()
        await listener.wait_closed()


async def until(holds):
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def echoed(port, context=None):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(b"hello")
    answer = await reader.readexactly(5)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return answer


@pytest.fixture
def contexts(fleet_ca):
    server = tls.server_context(fleet_ca.cloud, client_certificates=False)
    return server, tls.client_context(fleet_ca.cloud.ca)


def test_those_that_never_begin_tls_make_room_and_do_not_hold_up_others(contexts):
    server, client = contexts

    async def main():
        async with listening(server) as (port, held):
            mute = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
            assert await echoed(port, client) == b"hello"
            ended = [asyncio.create_task(reader.read()) for reader, _ in mute]
            done, waiting = await _all_but(ended, LIMITS.max_waiting)
            assert held.num_waiting <= LIMITS.max_waiting
            for task in waiting:
                task.cancel()
            for _, writer in mute:
                writer.close()
            return len(done)

    assert asyncio.run(main()) >= 30 - LIMITS.max_waiting


async def _all_but(tasks, few):
    """Wait until no more than `few` of the tasks run."""
    pending = set(tasks)
    while len(pending) > few:
        _, pending = await asyncio.wait(pending, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    return set(tasks) - pending, pending


@pytest.mark.parametrize("turns", range(8))
def test_no_connection_is_left_open_whenever_it_closes(turns):
    async def main():
        async with listening() as (port, _):
            client = socket.create_connection(("127.0.0.1", port))
            for _ in range(turns):
                await asyncio.sleep(0)
        client.setblocking(False)
        with client:
            try:
                client.shutdown(socket.SHUT_WR)
            except OSError:
                return  # it is reset
            with contextlib.suppress(ConnectionResetError):
                async with asyncio.timeout(30):
                    assert await asyncio.get_running_loop().sock_recv(client, 1) == b""

    asyncio.run(main())
    gc.collect()  # a socket that nobody closed warns when it is collected


def test_a_handshake_has_a_deadline(contexts):
    server, _ = contexts
    limits = ConnectionLimits(max_open=5, max_waiting=5, waiting_s=0.2)

    async def main():
        async with listening(server, limits) as (port, held), asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x16\x03")  # the beginning of a ClientHello
            assert await reader.read() == b""
            writer.close()
            await until(lambda: not len(held))

    asyncio.run(main())


def test_a_failed_handshake_gives_its_place_back(contexts):
    server, _ = contexts

    async def main():
        async with listening(server) as (port, held), asyncio.timeout(30):
            with pytest.raises((ssl.SSLError, OSError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=ssl.create_default_context())
            await until(lambda: not len(held))

    asyncio.run(main())


def test_when_all_places_are_settled_a_new_one_is_closed_at_once():
    limits = ConnectionLimits(max_open=2, max_waiting=2, waiting_s=30.0)

    async def main():
        async with listening(limits=limits) as (port, held), asyncio.timeout(30):
            settled = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for reader, writer in settled:
                writer.write(b"x")
                await reader.readexactly(1)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            writer.close()
            settled[0][1].close()
            await until(lambda: len(held) <= 1)
            assert await echoed(port) == b"hello"
            settled[1][1].close()

    asyncio.run(main())


class Failing(socket.socket):
    """A listening socket that first fails with these errors, one at each attempt to accept."""

    def __init__(self, *faults):
        super().__init__(fileno=socket.create_server(("127.0.0.1", 0)).detach())
        self.faults = list(faults)

    def accept(self):
        if self.faults:
            raise OSError(self.faults.pop(0), "injected")
        return super().accept()


def test_without_descriptors_it_waits_and_goes_on(caplog):
    async def main():
        async with listening(listens=Failing(errno.EMFILE, errno.ECONNABORTED)) as (port, _):
            return await echoed(port)

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(main()) == b"hello"
    assert [line.partition(" ")[0] for line in caplog.messages] == ["port.no_descriptors"]


def test_closing_frees_the_port_and_ends_what_has_not_begun(contexts):
    server, _ = contexts

    async def main():
        async with listening(server) as (port, held):
            mute = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await until(lambda: held.num_waiting == 3)
        async with asyncio.timeout(30):
            assert [await reader.read() for reader, _ in mute] == [b""] * 3
        for _, writer in mute:
            writer.close()
        socket.create_server(("127.0.0.1", port)).close()

    asyncio.run(main())


def test_a_defect_that_a_connection_finds_costs_that_connection_only(monkeypatch, caplog):
    monkeypatch.setattr("edgefl.protocols.ports.listener.NO_DESCRIPTOR_S", 0.01)
    faults, take = [ZeroDivisionError()], Listener._take

    def stumble(self, connection, address):
        if faults:
            connection.close()
            raise faults.pop()
        take(self, connection, address)

    monkeypatch.setattr(Listener, "_take", stumble)

    async def main():
        async with listening() as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            return await asyncio.wait_for(echoed(port), 5)

    asyncio.run(main())
    assert "port.fault port=test" in caplog.text


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOTSOCK])
def test_a_listening_socket_that_is_none_any_more_ends_the_part(number):
    async def main():
        held = Connections(LIMITS, asyncio.get_running_loop().time)
        listener = Listener(Port(name="test", socket=Failing(number)), held, Echo)
        listener.start()
        accepting = listener.tasks[0]
        await asyncio.wait({accepting}, timeout=30)
        listener.close()
        await listener.wait_closed()
        return accepting.exception()

    assert asyncio.run(main()).errno == number


@pytest.mark.parametrize(
    ("host", "seen"),
    [
        ("192.0.2.1", "this machine does not have the address 192.0.2.1"),  # RFC 5737: of nobody
        ("no.such.host.invalid", "no address was found for the name 'no.such.host.invalid'"),  # RFC 6761
        ("x" * 64, "no address was found for the name 'xxx"),  # longer than a part of a name may be
    ],
)
def test_a_host_that_is_not_this_machine_is_not_the_ports_fault(host, seen):
    with pytest.raises(ConfigError) as refused:
        listen(host, 0, "--http-port", "--serve-host")
    assert f"cannot listen on {host}:0: {seen}" in str(refused.value)
    assert "give --serve-host an address of this machine" in str(refused.value)
    assert "--http-port" not in str(refused.value)


def test_a_port_in_use_says_that_another_program_has_it():
    with listen("127.0.0.1", 0, "--http-port") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refused:
            listen("127.0.0.1", port, "--http-port")
    assert str(refused.value) == (
        f"cannot listen on 127.0.0.1:{port}: another program uses this port; stop it, or choose another --http-port"
    )


LISTEN_AS_NOBODY = """
import os
from edgefl.errors import ConfigError
from edgefl.protocols.ports.listener import listen
if os.geteuid() == 0:
    os.setuid(65534)
try:
    listen("127.0.0.1", 443, "--http-port").close()
except ConfigError as refused:
    print(refused)
"""


def lowest_free_port() -> int:
    file = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    return int(file.read_text()) if file.exists() else 1024


@pytest.mark.skipif(lowest_free_port() <= 443, reason="here every user may listen on port 443")
def test_a_port_below_1024_is_for_root():
    seen = subprocess.run(
        [sys.executable, "-c", LISTEN_AS_NOBODY], capture_output=True, text=True, timeout=60, check=True
    )
    assert seen.stdout == (
        "cannot listen on 127.0.0.1:443: ports below 1024 need root; choose a --http-port above that, "
        "or run it as root\n"
    )
