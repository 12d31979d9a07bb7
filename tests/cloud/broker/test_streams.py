"""One connection's two sides: what amqtt gets to read, what is answered before it, and what may leave."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from cloud.broker import streams as broker_streams
from cloud.broker.streams import MAX_FILTERS, GatedReader, GatedWriter, Share
from cloud.broker.wire import Connect
from edgefl.errors import ProtocolError

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


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("size", [2, 30_000])
def test_by_law_a_device_is_read_no_faster_than_its_share(size: int) -> None:
    clock = Clock()
    share = Share(clock)
    per_s = min(broker_streams.PACKETS_PER_S, broker_streams.BYTES_PER_S / size)
    burst = min(broker_streams.PACKETS_BURST, broker_streams.BYTES_BURST / size)
    for number in range(1, int(burst + 10 * per_s)):
        clock.now_s += share.take(size)
        assert number <= burst + per_s * clock.now_s + 1
    assert clock.now_s > 9


def test_patience_ends_with_one_that_never_comes_below_its_share() -> None:
    clock = Clock()
    share = Share(clock)

    def flood() -> None:
        for _ in range(100_000):
            clock.now_s += share.take(2)

    with pytest.raises(ProtocolError, match="for 30 s it sent more than its share of 200 packets and 256 kB a second"):
        flood()
    assert 30 < clock.now_s < 31


def test_one_that_rests_in_between_is_kept() -> None:
    clock = Clock()
    share = Share(clock)
    for _ in range(20):
        for _ in range(2000):
            clock.now_s += share.take(2)
        clock.now_s += 10
    assert share.take(2) == 0.0


@pytest.mark.parametrize("packet", [b"\xc0\0", b"\x40\2\0\1", PUBLISH])
def test_whatever_a_device_floods_with_others_have_their_turn(monkeypatch, packet: bytes) -> None:
    monkeypatch.setattr(broker_streams, "PACKETS_BURST", 5)
    monkeypatch.setattr(broker_streams, "PACKETS_PER_S", 1e-3)

    async def go() -> int:
        reader, _ = reader_of(packet * 20)
        await skip_connect(reader)
        num_read = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                while True:
                    await reader.read(len(packet))
                    num_read += 1
        return num_read

    assert asyncio.run(go()) == 5


def test_a_device_does_not_subscribe_for_ever(caplog) -> None:
    async def go() -> None:
        topic = b"edgefl/v1/down/cam-1/x"
        subscribe = bytes([0x82, 5 + len(topic), 0, 1]) + len(topic).to_bytes(2) + topic + b"\1"
        reader, _ = reader_of(subscribe * (MAX_FILTERS + 1))
        await skip_connect(reader)
        for _ in range(MAX_FILTERS):
            await reader.read(len(subscribe))
        with pytest.raises(asyncio.IncompleteReadError):
            await reader.read(1)

    asyncio.run(go())
    assert "more than 64 filters" in caplog.text


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
