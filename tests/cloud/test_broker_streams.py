"""One connection's two sides: what amqtt gets to read, what is answered before it, and what may leave."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cloud import broker_streams
from cloud.broker_streams import GatedReader, GatedWriter
from cloud.mqtt_wire import Connect

HELLO = Connect(flags=0x02, keepalive_s=10, user="", will_topic=None, will=())
TOPIC = b"\0\x18edgefl/v1/up/cam-1/state"
PUBLISH = b"\x32\x1d" + TOPIC + b"\0\1x"
DISCONNECT = b"\xe0\0"


def reader_of(
    data: bytes, connect: Connect = HELLO, answers: list[bytes] | None = None
) -> tuple[GatedReader, asyncio.StreamReader]:
    stream = asyncio.StreamReader()
    stream.feed_data(data)
    return GatedReader("cam-1", stream, connect, [].append if answers is None else answers.append), stream


async def skip_connect(reader: GatedReader) -> None:
    hello = HELLO.as_client("cam-1", reader.client_id)
    assert await reader.read(len(hello)) == hello


def test_packets_come_in_the_pieces_that_amqtt_asks_for() -> None:
    async def go() -> None:
        reader, stream = reader_of(PUBLISH + b"\xc0\0")
        await skip_connect(reader)
        assert [await reader.read(1), await reader.read(1), await reader.read(29)] == [b"\x32", b"\x1d", PUBLISH[2:]]
        assert await reader.read(2) == b"\xc0\0"
        stream.feed_eof()
        reader.note_delivery()
        with pytest.raises(asyncio.IncompleteReadError):
            await reader.read(1)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x30\x81\x88\x02", "packet of"),
        (b"\x34\x06\0\1t\0\1x", "QoS 0 and 1"),
        (b"\x30\x04\0\1#x", "no topic"),
        (b"\x82\6\0\1\0\1t\2", "QoS 2"),
        (HELLO.as_client("cam-1", "cam-1"), "second CONNECT"),
    ],
)
def test_the_stream_ends_with_the_first_fault(data: bytes, reason: str, caplog) -> None:
    async def go() -> None:
        reader, _ = reader_of(data + b"\xc0\0")
        await skip_connect(reader)
        for _ in range(2):
            with pytest.raises(asyncio.IncompleteReadError):
                await reader.read(1)

    asyncio.run(go())
    [line] = caplog.messages
    assert reason in line
    assert "device=cam-1" in line


def test_no_field_is_read_out_of_the_next_packet(caplog) -> None:
    async def go() -> None:
        reader, _ = reader_of(b"\x40\x01x" + b"\xc0\0")
        await skip_connect(reader)
        await reader.read(2)
        for _ in range(2):
            with pytest.raises(asyncio.IncompleteReadError):
                await reader.read(2)

    asyncio.run(go())
    assert "ends before its fields" in caplog.text


def test_a_silent_client_is_given_up(caplog) -> None:
    async def go() -> None:
        reader, _ = reader_of(b"", Connect(flags=0x02, keepalive_s=1, user="", will_topic=None, will=()))
        await skip_connect(reader)
        with pytest.raises(asyncio.IncompleteReadError):
            await reader.read(1)

    asyncio.run(go())
    assert "nothing was heard for 1.5 s" in caplog.text


@pytest.mark.parametrize("end", [DISCONNECT, b""])
def test_a_goodbye_waits_until_all_that_was_sent_is_delivered(end: bytes) -> None:
    async def go() -> None:
        reader, stream = reader_of(PUBLISH * 2 + end)
        stream.feed_eof()
        await skip_connect(reader)
        await reader.read(31)
        await reader.read(31)
        goodbye = asyncio.create_task(reader.read(2))
        reader.note_delivery()
        done, _ = await asyncio.wait({goodbye}, timeout=0.05)
        assert not done
        reader.note_delivery()
        if end:
            assert await asyncio.wait_for(goodbye, 1) == DISCONNECT
        else:
            with pytest.raises(asyncio.IncompleteReadError):
                await asyncio.wait_for(goodbye, 1)

    asyncio.run(go())


def test_what_a_client_has_no_right_to_is_answered_and_goes_no_further(caplog) -> None:
    answers: list[bytes] = []
    others = b"\0\x18edgefl/v1/up/cam-2/state"
    refused = [
        b"\x32\x1c" + others + b"\0\7",
        b"\x30\x1a" + others,
        b"\x82\x1d\0\x08" + others + b"\1",
        b"\x82\x0e\0\x09\0\1#\0\0\5+/+/+\1",
    ]

    async def go() -> None:
        reader, _ = reader_of(b"".join(refused) + PUBLISH, answers=answers)
        await skip_connect(reader)
        assert await reader.read(31) == PUBLISH

    asyncio.run(go())
    assert answers == [b"\x40\2\0\7", b"", b"\x90\3\0\x08\x80", b"\x90\4\0\x09\x80\x80"]
    assert caplog.text.count("broker.refused device=cam-1 action=") == 4


def test_a_device_that_floods_is_read_at_its_pace(monkeypatch) -> None:
    monkeypatch.setattr(broker_streams, "MESSAGES_PER_S", 100)
    monkeypatch.setattr(broker_streams, "BURST", 3)

    async def go() -> float:
        reader, _ = reader_of(PUBLISH * 13)
        await skip_connect(reader)
        began_s = asyncio.get_running_loop().time()
        for _ in range(13):
            await reader.read(31)
        return asyncio.get_running_loop().time() - began_s

    assert 0.09 < asyncio.run(go()) < 2  # ten beyond the burst, at 100 a second


def test_what_a_client_may_not_read_does_not_leave() -> None:
    async def go() -> bytes:
        received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.set_result(await reader.read())
            writer.close()

        async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
            _, stream = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer = GatedWriter("cam-1", stream)
            for topic in (b"edgefl/v1/down/cam-2/job", b"edgefl/v1/up/cam-2/state", b"edgefl/v1/down/cam-1/job"):
                writer.write(bytes([0x30, 2 + len(topic)]) + len(topic).to_bytes(2) + topic)
            writer.write(b"\xd0\0")
            await writer.drain()
            await writer.close()
            writer.write(b"\xd0\0")  # nobody is there: no error, no effect
            return await asyncio.wait_for(received, 5)

    assert asyncio.run(go()) == b"\x30\x1a\0\x18edgefl/v1/down/cam-1/job\xd0\0"


def test_a_client_that_reads_nothing_is_given_up(monkeypatch, caplog) -> None:
    monkeypatch.setattr(broker_streams, "WRITE_S", 0.1)

    async def go() -> None:
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            _, stream = await asyncio.open_connection(*deaf.getsockname())
            writer = GatedWriter("cam-1", stream)
            writer.write(b"\xd0\0" * 8_000_000)
            with pytest.raises(ConnectionResetError):
                await writer.drain()

    asyncio.run(go())
    assert "device=cam-1" in caplog.text
