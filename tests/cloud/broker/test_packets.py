"""Packets by hand, and by an enemy: whatever the bytes, a ProtocolError or an answer."""

from __future__ import annotations

import contextlib
import random

import pytest

from cloud.broker import packets
from cloud.broker.packets import (
    MAX_PACKET_BYTES,
    Connect,
    Fields,
    MqttMessage,
    acknowledgement,
    cut,
    parse_connect,
    parse_publish,
    parse_subscribe,
    publish,
)
from edgefl.errors import ProtocolError

BARE = b"\0\4MQTT\4\x02\0\x0a\0\3cam"
FULL = b"\0\4MQTT\4\xee\0\x3c\0\3cam\0\1t\0\2by\0\2me\0\4pass"


def test_a_connect_by_hand() -> None:
    assert parse_connect(BARE) == Connect("cam", "", True, 10, None)
    assert parse_connect(FULL) == Connect("cam", "me", True, 60, MqttMessage("t", b"by", 1, True))


@pytest.mark.parametrize(
    "body",
    [
        BARE.replace(b"MQTT\4", b"MQTT\5"),  # MQTT 5
        BARE.replace(b"MQTT", b"MQTX"),
        BARE[:-1],
        BARE + b"x",
        BARE.replace(b"\x04\x02", b"\x04\x06"),  # announces a will, has none
        BARE.replace(b"\x04\x02", b"\x04\x03"),  # the reserved flag
        FULL.replace(b"\xee", b"\xfe"),  # a will of QoS 3
        FULL.replace(b"me", b"\xff\xfe"),
        FULL.replace(b"\1t", b"\1#"),
    ],
)
def test_another_connect_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_connect(body)


def test_whatever_the_bytes_there_is_an_answer() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        body = bytearray(FULL)
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        part = bytes(body[: rng.randrange(len(body) + 1)])
        for function in (
            parse_connect,
            lambda data: parse_publish(rng.randrange(16), data),
            lambda data: parse_subscribe(data, with_qos=rng.random() < 0.5),
            lambda data: cut(bytearray(data)),
            lambda data: Fields(data).number(),
        ):
            with contextlib.suppress(ProtocolError):
                function(part)


def test_a_publish_by_hand_there_and_back() -> None:
    message = MqttMessage("t", b"x", 1, True)
    assert publish(message, 1, 7, retain=False) == b"\x32\x06\0\1t\0\x07x"
    assert publish(message, 0, 0, retain=True) == b"\x31\x04\0\1tx"
    assert parse_publish(0b0011, b"\0\1t\0\x07x") == (message, 7)
    assert parse_publish(0, b"\0\1t") == (MqttMessage("t", b"", 0, False), 0)


def test_acknowledgements_by_hand() -> None:
    assert acknowledgement(packets.PUBACK, 258) == b"\x40\2\1\2"
    assert acknowledgement(packets.PUBREL, 1) == b"\x62\2\0\1"


@pytest.mark.parametrize("length", [0, 127, 128, 16383, 16384, MAX_PACKET_BYTES])
def test_by_law_what_is_written_is_read(length: int) -> None:
    body = bytes(length)
    data = bytearray(packets.packet(packets.PUBLISH, body, 2) + b"next")
    assert cut(data) == (packets.PUBLISH, 2, body)
    assert data == b"next"


def test_a_subscribe_by_hand() -> None:
    assert parse_subscribe(b"\0\x09\0\1#\0\0\5+/+/+\1", with_qos=True) == (9, [("#", 0), ("+/+/+", 1)])
    assert parse_subscribe(b"\0\x09\0\3a/b", with_qos=False) == (9, [("a/b", 0)])


@pytest.mark.parametrize(
    "body",
    [
        b"\0\1",
        b"\0\1\0\1",
        b"\0\1\0\1t",
        b"\0\1\0\1t\3",
        b"\0\1\0\1\xff\1",
        b"\0\1\0\3#/a\1",
        b"\0\1\0\2a#\1",
        b"\0\1\0\2+b\1",
    ],
)
def test_a_broken_subscribe_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_subscribe(body, with_qos=True)


@pytest.mark.parametrize(
    ("flags", "body"),
    [
        (6, b"\0\1t\0\1x"),
        (0, b"\0\1#x"),
        (0, b"\0\1+x"),
        (2, b"\0\1t"),
        (0, b"\0\1\xffx"),
        (0, b"\0\0x"),
        (0, b"\0\1\0x"),
    ],
)
def test_a_broken_publish_is_refused(flags: int, body: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_publish(flags, body)


def test_packets_are_cut_whole_and_up_to_the_limit() -> None:
    assert cut(bytearray(b"")) is None
    assert cut(bytearray(b"\x30\x80")) is None
    assert cut(bytearray(b"\x30\x05ab")) is None
    with pytest.raises(ProtocolError, match=str(MAX_PACKET_BYTES + 1)):
        cut(bytearray(b"\x30\x81\x88\x02"))  # refused by its header
    with pytest.raises(ProtocolError, match="four bytes"):
        cut(bytearray(b"\x30\xff\xff\xff\xff\x01"))
    with pytest.raises(ProtocolError, match="not a CONNECT"):
        cut(bytearray(b"G"), first=True)
