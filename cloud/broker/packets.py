"""MQTT 3.1.1 packets, parsed and encoded for the built-in broker.

Invariant: for any bytes, a function here returns or raises ProtocolError.
MQTT 3.1.1, section 2.2 (header), chapter 3 (packets) and section 4.7 (topics).
"""

from __future__ import annotations

from typing import NamedTuple

from edgefl.errors import ProtocolError
from edgefl.protocols.messages import MAX_MESSAGE_BYTES

MAX_PACKET_BYTES = MAX_MESSAGE_BYTES + 1024  # a topic and the headers
CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE = range(1, 9)
SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = range(9, 15)
DUP = 8  # flag of a PUBLISH that is sent again


class MqttMessage(NamedTuple):
    """A message to publish, or a will."""

    topic: str
    payload: bytes
    qos: int
    retain: bool


class Connect(NamedTuple):
    """The fields of a client's CONNECT."""

    client_id: str
    user: str
    clean: bool
    keepalive_s: int
    will: MqttMessage | None


def packet(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    """Return a packet of any kind as bytes."""
    size, rest = len(body), bytearray()
    while size > 0x7F:
        rest.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([kind << 4 | flags, *rest, size]) + body


def acknowledgement(kind: int, number: int) -> bytes:
    """Return a PUBACK, PUBREC, PUBREL, PUBCOMP or UNSUBACK."""
    return packet(kind, number.to_bytes(2), 2 if kind == PUBREL else 0)


def publish(message: MqttMessage, qos: int, number: int, *, retain: bool) -> bytes:
    """Return a PUBLISH."""
    topic = message.topic.encode()
    body = len(topic).to_bytes(2) + topic + (number.to_bytes(2) if qos else b"") + message.payload
    return packet(PUBLISH, body, qos << 1 | retain)


def cut(data: bytearray, *, first: bool = False) -> tuple[int, int, bytes] | None:
    """Remove the first packet from `data` and return its kind, flags and body; None if it is incomplete.

    The `first` packet of a connection must be a CONNECT.
    """
    if data and first and data[0] != CONNECT << 4:
        raise ProtocolError("the first packet is not a CONNECT")
    size = 0
    for at in range(1, min(5, len(data))):
        size |= (data[at] & 0x7F) << 7 * (at - 1)
        if not data[at] & 0x80:
            break
    else:
        if len(data) >= 5:
            raise ProtocolError("a packet's length does not end within four bytes")
        return None
    if size > MAX_PACKET_BYTES:
        raise ProtocolError(f"a packet has {size} bytes; at most {MAX_PACKET_BYTES} are allowed")
    end = at + 1 + size
    if len(data) < end:
        return None
    found = data[0] >> 4, data[0] & 15, bytes(data[at + 1 : end])
    del data[:end]
    return found


class Fields:
    """Reads the fields of a packet's body in order; raises ProtocolError if the body is too short."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._body) - self._at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise ProtocolError("a packet is shorter than its fields")
        self._at += size
        return self._body[self._at - size : self._at]

    def number(self, size: int = 2) -> int:
        return int.from_bytes(self.take(size))

    def text(self) -> str:
        try:
            text = self.take(self.number()).decode()
        except UnicodeDecodeError as cause:
            raise ProtocolError("a packet has text that is not UTF-8") from cause
        if "\0" in text:
            raise ProtocolError("a packet has text with a zero byte")
        return text


def parse_connect(body: bytes) -> Connect:
    """Return the CONNECT with this body."""
    fields = Fields(body)
    if (fields.text(), fields.number(1)) != ("MQTT", 4):
        raise ProtocolError("the first packet is not a CONNECT of MQTT 3.1.1")
    flags, keepalive_s, client_id, will = fields.number(1), fields.number(), fields.text(), None
    if flags & 4:
        topic, payload = fields.text(), fields.take(fields.number())
        will = MqttMessage(checked_topic(topic), payload, checked_qos(flags >> 3), bool(flags & 0x20))
    user = fields.text() if flags & 0x80 else ""
    if flags & 0x40:
        fields.take(fields.number())  # the password is ignored
    if fields.left or flags & 1:
        raise ProtocolError("the fields of the CONNECT do not match its flags")
    return Connect(client_id, user, bool(flags & 2), keepalive_s, will)


def parse_publish(flags: int, body: bytes) -> tuple[MqttMessage, int]:
    """Return the message and the packet id (0 for QoS 0) of a PUBLISH."""
    fields, qos = Fields(body), checked_qos(flags >> 1)
    topic = checked_topic(fields.text())
    number = fields.number() if qos else 0
    return MqttMessage(topic, fields.take(fields.left), qos, bool(flags & 1)), number


def parse_subscribe(body: bytes, *, with_qos: bool) -> tuple[int, list[tuple[str, int]]]:
    """Return the packet id of a SUBSCRIBE or UNSUBSCRIBE, and its filters with their QoS."""
    fields, filters = Fields(body), []
    number = fields.number()
    while fields.left:
        levels = fields.text()
        if any(set(level) & set("+#") and len(level) > 1 for level in levels.split("/")) or "#" in levels[:-1]:
            raise ProtocolError(f"{levels!r} is not a valid topic filter")
        filters.append((levels, checked_qos(fields.number(1)) if with_qos else 0))
    if not filters:
        raise ProtocolError("a SUBSCRIBE or UNSUBSCRIBE has no filter")
    return number, filters


def checked_topic(topic: str) -> str:
    """Return the topic; raises ProtocolError if nothing can be published on it."""
    if not topic or set(topic) & set("+#"):
        raise ProtocolError(f"{topic!r} is not a valid topic to publish on")
    return topic


def checked_qos(bits: int) -> int:
    """Return the QoS in the lowest two bits of a number."""
    if bits & 3 == 3:
        raise ProtocolError("a packet has QoS 3, expected 0, 1 or 2")
    return bits & 3
