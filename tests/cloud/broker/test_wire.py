"""Packets by hand, and by an enemy: whatever the bytes, a ProtocolError or an answer."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from cloud.broker.wire import (
    MAX_PACKET_BYTES,
    Connect,
    check_publish,
    parse_connect,
    puback,
    publish_topic,
    read_packet,
    suback_refused,
    subscribe_filters,
)
from edgefl.errors import ProtocolError

BARE = b"\x10\x0f\0\4MQTT\4\x02\0\x0a\0\3cam"
FULL = b"\x10\x20\0\4MQTT\4\xee\0\x3c\0\3cam\0\1t\0\2by\0\2me\0\4pass"


def read(data: bytes) -> bytes:
    async def go() -> bytes:
        stream = asyncio.StreamReader()
        stream.feed_data(data)
        stream.feed_eof()
        return await read_packet(stream)

    return asyncio.run(go())


def test_a_connect_by_hand() -> None:
    assert parse_connect(BARE) == Connect(flags=0x02, keepalive_s=10, user="", will_topic=None, will=())
    assert parse_connect(FULL) == Connect(flags=0xEE, keepalive_s=60, user="me", will_topic="t", will=(b"t", b"by"))


def test_amqtt_gets_the_certificates_name_a_clean_session_and_no_password() -> None:
    again = parse_connect(parse_connect(FULL).as_client("cam-1", "cam-1#7"))
    assert again == Connect(flags=0xAE, keepalive_s=0, user="cam-1", will_topic="t", will=(b"t", b"by"))
    assert parse_connect(BARE).as_client("cam", "cam#7") == b"\x10\x16\0\4MQTT\4\x82\0\0\0\5cam#7\0\3cam"


@pytest.mark.parametrize(
    "packet",
    [
        b"\x30" + BARE[1:],  # not a CONNECT
        BARE.replace(b"MQTT\4", b"MQTT\5"),  # MQTT 5
        BARE[:-1],
        BARE + b"x",
        BARE.replace(b"\x04\x02", b"\x04\x06"),  # announces a will, has none
        b"\x10\xff\xff\xff\xff" + BARE,
        FULL.replace(b"me", b"\xff\xfe"),
    ],
)
def test_another_first_packet_is_refused(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_connect(packet)


def test_whatever_the_bytes_there_is_an_answer() -> None:
    rng = random.Random(0)  # no secret
    for _ in range(2000):
        packet = bytearray(FULL)
        for _ in range(rng.randrange(1, 4)):
            packet[rng.randrange(len(packet))] = rng.randrange(256)
        for function in (parse_connect, publish_topic, check_publish, subscribe_filters, suback_refused):
            with contextlib.suppress(ProtocolError):
                function(bytes(packet[: rng.randrange(1, len(packet) + 1)]))


def test_a_publish_by_hand() -> None:
    packet = b"\x32\x06\0\1t\0\1x"
    assert publish_topic(packet) == "t"
    assert puback(packet) == b"\x40\2\0\1"
    assert puback(b"\x30\4\0\1tx") == b""
    check_publish(packet)


def test_a_subscribe_by_hand() -> None:
    packet = b"\x82\x0e\0\x09\0\1#\0\0\5+/+/+\1"
    assert subscribe_filters(packet) == ["#", "+/+/+"]
    assert suback_refused(packet) == b"\x90\4\0\x09\x80\x80"


@pytest.mark.parametrize(
    "packet",
    [b"\x82\2\0\1", b"\x82\4\0\1\0\1", b"\x82\5\0\1\0\1t", b"\x82\6\0\1\0\1t\2", b"\x82\6\0\1\0\1\xff\1"],
)
def test_a_broken_subscribe_is_refused(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        subscribe_filters(packet)


@pytest.mark.parametrize(
    "packet",
    [b"\x34\x06\0\1t\0\1x", b"\x36\x06\0\1t\0\1x", b"\x38\x04\0\1tx", b"\x30\x04\0\1#x", b"\x30\x04\0\1+x",
     b"\x32\x03\0\1t", b"\x30\x04\0\1$x", b"\x30\x04\0\1\xffx", b"\x30\x03\0\0x", b"\x30\x04\0\1\0x"],
)  # fmt: skip
def test_a_publish_that_amqtt_would_trip_over_is_refused(packet: bytes) -> None:
    with pytest.raises(ProtocolError):
        check_publish(packet)


def test_packets_are_read_whole_up_to_the_limit() -> None:
    largest = b"\x30" + b"\x80\x88\x02" + bytes(MAX_PACKET_BYTES)
    assert read(largest + b"next") == largest
    assert read(b"\xc0\0") == b"\xc0\0"
    with pytest.raises(ProtocolError, match=str(MAX_PACKET_BYTES + 1)):
        read(b"\x30\x81\x88\x02")  # refused by its header
    with pytest.raises(ProtocolError, match="four bytes"):
        read(b"\x30\xff\xff\xff\xff\x01")
    with pytest.raises(asyncio.IncompleteReadError):
        read(b"\x30\x05ab")
