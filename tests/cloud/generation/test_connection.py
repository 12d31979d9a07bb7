"""Messages of a tail's process, over a real socket pair."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cloud.generation.connection import TailConnection
from cloud.generation.wire import HEAD, RunStep, StepDone, TailUp, packed
from edgefl.errors import ProtocolError

UP, DONE = TailUp(pid=7), StepDone(step=1, tokens=[3], errors=[""])


def run(test):
    """Run `test(connection, other end, what was handed on, reasons of refusals)`."""

    async def main():
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        handed, reasons = asyncio.Queue(), []
        loop = asyncio.get_running_loop()

        def handle(message) -> None:
            if isinstance(message, RunStep):
                raise ProtocolError("a process computes no steps of others")
            handed.put_nowait(message)

        _, connection = await loop.create_connection(lambda: TailConnection(handle, reasons.append), sock=ours)
        with theirs:
            await test(connection, theirs, handed, reasons)
            connection.abort()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_messages_are_whole_however_their_bytes_arrive() -> None:
    data = packed(UP) + packed(DONE) * 2

    async def test(connection, theirs, handed, reasons):
        loop = asyncio.get_running_loop()
        for size in (1, 7, len(data)):
            for at in range(0, len(data), size):
                await loop.sock_sendall(theirs, data[at : at + size])
                await asyncio.sleep(0)
            assert [await handed.get() for _ in range(3)] == [UP, DONE, DONE]
            assert handed.empty()
        assert reasons == []

    run(test)


def test_what_is_sent_arrives_also_if_it_does_not_fit_the_socket() -> None:
    step, body = RunStep(step=5, items=[]), bytes(4 << 20)

    async def test(connection, theirs, _handed, _reasons):
        connection.send(step, body)
        expected, seen = packed(step, body), b""
        while len(seen) < len(expected):
            seen += await asyncio.get_running_loop().sock_recv(theirs, 1 << 20)
        assert seen == expected

    run(test)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (packed(RunStep(step=1, items=[])), "a process computes no steps of others"),
        (HEAD.pack(9, 0) + b"something", "not a message between server and tail: b'something'"),
        (HEAD.pack(1 << 31, 0), "has a header of 2147483648"),
        (packed(UP, b"bytes"), "has 5 bytes behind its header, expected none"),
    ],
)
def test_anything_else_ends_the_connection_with_its_reason(data, reason) -> None:
    async def test(connection, theirs, handed, reasons):
        await asyncio.get_running_loop().sock_sendall(theirs, packed(UP) + data + packed(UP))
        await connection.ended
        assert handed.get_nowait() == UP
        assert handed.empty()  # nothing behind the refused one
        assert len(reasons) == 1
        assert reason in reasons[0]
        assert await asyncio.get_running_loop().sock_recv(theirs, 1) == b""

    run(test)


@pytest.mark.parametrize("words", [b"", packed(UP)[:-1]])
def test_an_end_is_told_also_in_the_middle_of_a_message(words) -> None:
    async def test(connection, theirs, handed, reasons):
        await asyncio.get_running_loop().sock_sendall(theirs, words)
        theirs.close()
        await connection.ended
        assert (handed.empty(), reasons) == (True, [])
        connection.send(RunStep(step=1, items=[]))  # to nobody; the next process hears of its own steps only

    run(test)
