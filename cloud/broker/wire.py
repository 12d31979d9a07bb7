"""The few MQTT 3.1.1 packets that the embedded broker's gate looks into, as bytes.

Invariant: whatever the bytes, a function here returns or raises ProtocolError.
MQTT 3.1.1, sections 2.2 (header), 3.1 (CONNECT), 3.3 (PUBLISH) and 3.8 (SUBSCRIBE).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from edgefl.errors import ProtocolError
from edgefl.protocols.messages import MAX_MESSAGE_BYTES

MAX_PACKET_BYTES = MAX_MESSAGE_BYTES + 1024  # a topic and the headers
CONNECT, PUBLISH, SUBSCRIBE, DISCONNECT = 1, 3, 8, 14
NOT_AUTHORIZED, SERVER_UNAVAILABLE = b"\x20\x02\x00\x05", b"\x20\x02\x00\x03"  # CONNACKs

_WILL, _PASSWORD, _USER, _CLEAN = 0x04, 0x40, 0x80, 0x02


@dataclass(frozen=True, kw_only=True, slots=True)
class Connect:
    """What a client asks for in its CONNECT."""

    flags: int
    keepalive_s: int
    user: str
    will_topic: str | None
    will: tuple[bytes, ...]  # topic and message as they came

    def as_client(self, name: str, client_id: str) -> bytes:
        """Return the CONNECT for amqtt: a clean session of this name; keep-alive is watched by the gate."""
        flags = self.flags & ~_PASSWORD | _USER | _CLEAN
        fields = (client_id.encode(), *self.will, name.encode())
        body = b"\0\4MQTT\4" + bytes([flags, 0, 0]) + b"".join(len(one).to_bytes(2) + one for one in fields)
        return bytes([CONNECT << 4]) + _varint(len(body)) + body


def parse_connect(packet: bytes) -> Connect:
    """Return the CONNECT that a packet is; raises ProtocolError."""
    _, start = _remaining_length(packet)
    body = packet[start:]
    if kind(packet) != CONNECT or body[:7] != b"\0\4MQTT\4" or len(body) < 10:
        raise ProtocolError("the first packet is not an MQTT 3.1.1 CONNECT")
    flags, fields = body[7], _fields(body[10:])
    num_will = 2 if flags & _WILL else 0
    if len(fields) != 1 + num_will + bool(flags & _USER) + bool(flags & _PASSWORD):
        raise ProtocolError("the CONNECT's fields are not those that its flags announce")
    try:
        user = fields[1 + num_will].decode() if flags & _USER else ""
        will_topic = fields[1].decode() if num_will else None
    except UnicodeDecodeError as cause:
        raise ProtocolError("the CONNECT holds text that is not UTF-8") from cause
    return Connect(
        flags=flags,
        keepalive_s=int.from_bytes(body[8:10]),
        user=user,
        will_topic=will_topic,
        will=tuple(fields[1 : 1 + num_will]),
    )


def kind(packet: bytes) -> int:
    """Return a packet's type: CONNECT, PUBLISH, DISCONNECT or another."""
    return packet[0] >> 4


def publish_topic(packet: bytes) -> str:
    """Return the topic of a PUBLISH; what is not UTF-8 in it is replaced."""
    return _publish_topic(packet).decode(errors="replace")


def check_publish(packet: bytes) -> None:
    """Raise ProtocolError for a PUBLISH that amqtt would trip over, and for QoS 2, which nobody speaks here."""
    qos, repeated = packet[0] >> 1 & 3, packet[0] & 8
    if qos > 1 or (repeated and not qos):
        raise ProtocolError(f"a PUBLISH with flags {packet[0] & 15:#x}: QoS 0 and 1 are spoken here")
    topic = publish_topic(packet)
    if not topic or topic.startswith("$") or set(topic) & set("+#\0\ufffd"):
        raise ProtocolError(f"{topic!r} is no topic to publish on")
    if qos and len(publish_id(packet)) < 2:
        raise ProtocolError("a PUBLISH of QoS 1 without a packet id")


def publish_id(packet: bytes) -> bytes:
    """Return the packet id of a PUBLISH of QoS 1."""
    _, start = _remaining_length(packet)
    at = start + 2 + len(_publish_topic(packet))
    return packet[at : at + 2]


def puback(packet: bytes) -> bytes:
    """Return the acknowledgement of a PUBLISH; nothing for QoS 0, which has none."""
    return b"\x40\x02" + publish_id(packet) if packet[0] >> 1 & 3 else b""


def subscribe_filters(packet: bytes) -> list[str]:
    """Return the topic filters of a SUBSCRIBE; raises ProtocolError."""
    _, at = _remaining_length(packet)
    at += 2  # the packet id
    filters = []
    while at < len(packet):
        end = at + 2 + int.from_bytes(packet[at : at + 2])
        if end >= len(packet) or packet[end] > 1:
            raise ProtocolError("a SUBSCRIBE that breaks off, or asks for QoS 2, which nobody speaks here")
        try:
            filters.append(packet[at + 2 : end].decode())
        except UnicodeDecodeError as cause:
            raise ProtocolError("a SUBSCRIBE with a filter that is not UTF-8") from cause
        at = end + 1
    if not filters:
        raise ProtocolError("a SUBSCRIBE without a filter")
    return filters


def suback_refused(packet: bytes) -> bytes:
    """Return the answer to a SUBSCRIBE that grants none of its filters."""
    _, at = _remaining_length(packet)
    codes = b"\x80" * len(subscribe_filters(packet))
    return b"\x90" + _varint(2 + len(codes)) + packet[at : at + 2] + codes


async def read_packet(stream: asyncio.StreamReader, wanted: int | None = None) -> bytes:
    """Return the next whole packet, of the wanted kind if one is named.

    Raises ProtocolError for another kind or one that is too large, IncompleteReadError at the end.
    """
    head = await stream.readexactly(2)
    if wanted is not None and kind(head) != wanted:
        raise ProtocolError(f"a packet of type {kind(head)} came where only type {wanted} may")
    while head[-1] & 0x80 and len(head) < 5:
        head += await stream.readexactly(1)
    size, _ = _remaining_length(head)
    if size > MAX_PACKET_BYTES:
        raise ProtocolError(f"packet of {size} bytes; at most {MAX_PACKET_BYTES} are allowed")
    return head + await stream.readexactly(size)


def _remaining_length(packet: bytes) -> tuple[int, int]:
    """Return the length that a packet's header announces, and where what it counts begins."""
    size = 0
    for at, byte in enumerate(packet[1:5]):
        size |= (byte & 0x7F) << 7 * at
        if not byte & 0x80:
            return size, at + 2
    raise ProtocolError("a packet's length does not end within four bytes")


def _publish_topic(packet: bytes) -> bytes:
    _, start = _remaining_length(packet)
    size = int.from_bytes(packet[start : start + 2])
    return packet[start + 2 : start + 2 + size]


def _varint(size: int) -> bytes:
    out = bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])


def _fields(data: bytes) -> list[bytes]:
    fields, at = [], 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2])
        if at + 2 > len(data) or end > len(data):
            raise ProtocolError("a field of the CONNECT is longer than its packet")
        fields.append(data[at + 2 : end])
        at = end
    return fields
