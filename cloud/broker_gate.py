"""The door of the embedded broker: who connects, and which bytes pass. Behind it works amqtt.

Why not amqtt's own listener (as of 0.12): it only asks for a certificate, deletes the session of any
client id that a stranger names before it has looked at rights, publishes wills unasked, sends each new
client the retained messages of everybody's subscriptions, keeps the dead past their keep-alive, and
reads packets of 256 MB. So we listen ourselves, by TLS 1.3 with our CA's certificates only, and hand
amqtt checked connections through its adapters for external listeners; its plugins ask for topic rights.

Invariants: user name and client id are the certificate's CN, whatever the client says; a name has one
connection, and the will of the former goes out before the latter is let in; no PUBLISH leaves on a
topic that its receiver may not read.  MQTT 3.1.1, sections 2.2, 3.1 and 3.3.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from edgefl.errors import MissingExtra, ProtocolError
from edgefl.logs import event
from edgefl.protocols import topics
from edgefl.protocols.messages import MAX_MESSAGE_BYTES
from edgefl.protocols.tls import CLOUD_NAME, common_name

try:
    from amqtt.adapters import ReaderAdapter, WriterAdapter
    from amqtt.broker import Broker
    from amqtt.contexts import Action, BrokerConfig, ListenerConfig, ListenerType
    from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
    from amqtt.session import Session
except ImportError as cause:
    raise MissingExtra("the embedded broker", "broker") from cause

MAX_PACKET_BYTES = MAX_MESSAGE_BYTES + 1024  # a topic and the headers
CONNECT_S = 10.0  # to say CONNECT after the handshake
WRITE_S = 10.0  # for a receiver to make room
LONGEST_KEEPALIVE_S = 300
LISTENER = "default"

_CONNECT, _PUBLISH = 1, 3
_WILL, _PASSWORD, _USER, _CLEAN = 0x04, 0x40, 0x80, 0x02
_NOT_AUTHORIZED = b"\x20\x02\x00\x05"

_SHOUTERS = ("amqtt", "transitions")  # they log every packet at INFO

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Connect:
    """What a client asks for in its CONNECT."""

    flags: int
    keepalive_s: int
    user: str
    will_topic: str | None
    will: tuple[bytes, ...]  # topic and message as they came

    def as_client(self, name: str) -> bytes:
        """Return the CONNECT for amqtt: a clean session of this name; keep-alive is watched here."""
        flags = self.flags & ~_PASSWORD | _USER | _CLEAN
        fields = (name.encode(), *self.will, name.encode())
        body = b"\0\4MQTT\4" + bytes([flags, 0, 0]) + b"".join(len(one).to_bytes(2) + one for one in fields)
        return bytes([_CONNECT << 4]) + _varint(len(body)) + body


def parse_connect(packet: bytes) -> Connect:
    """Return the CONNECT that a packet is; raises ProtocolError."""
    _, start = _remaining_length(packet)
    body = packet[start:]
    if packet[0] >> 4 != _CONNECT or body[:7] != b"\0\4MQTT\4" or len(body) < 10:
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


def publish_topic(packet: bytes) -> str | None:
    """Return the topic of a PUBLISH; None for any other packet."""
    if packet[0] >> 4 != _PUBLISH:
        return None
    _, start = _remaining_length(packet)
    size = int.from_bytes(packet[start : start + 2])
    return packet[start + 2 : start + 2 + size].decode(errors="replace")


async def read_packet(stream: asyncio.StreamReader) -> bytes:
    """Return the next whole packet; raises ProtocolError for one that is too large, IncompleteReadError at the end."""
    head = await stream.readexactly(2)
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


class GatedReader(ReaderAdapter):  # type: ignore[misc]  # amqtt ships no types
    """Gives amqtt one client's packets, whole ones only; the stream ends with the first fault."""

    def __init__(self, name: str, stream: asyncio.StreamReader, connect: Connect) -> None:
        self._name = name
        self._stream = stream
        self._silence_s = 1.5 * min(connect.keepalive_s or LONGEST_KEEPALIVE_S, LONGEST_KEEPALIVE_S)
        self._packet, self._at = connect.as_client(name), 0
        self._ended = False

    async def read(self, n: int = -1) -> bytes:
        if self._at == len(self._packet):
            await self._next_packet()
        end = self._at + n if n >= 0 else len(self._packet)
        if end > len(self._packet):
            self._end("a packet ends before its fields do")
        chunk, self._at = self._packet[self._at : end], end
        return chunk

    def feed_eof(self) -> None:
        self._ended = True

    async def _next_packet(self) -> None:
        if self._ended:
            raise asyncio.IncompleteReadError(b"", 1)
        try:
            async with asyncio.timeout(self._silence_s):
                self._packet, self._at = await read_packet(self._stream), 0
        except ProtocolError as fault:
            self._end(str(fault))
        except TimeoutError:
            self._end(f"nothing was heard for {self._silence_s:g} s")
        except OSError as fault:
            self._end(str(fault))

    def _end(self, reason: str) -> None:
        event(_log, logging.WARNING, "broker.closed", device=self._name, reason=reason)
        self._ended = True
        self._packet, self._at = b"", 0
        raise asyncio.IncompleteReadError(b"", 1)


class GatedWriter(WriterAdapter):  # type: ignore[misc]  # amqtt ships no types
    """Takes amqtt's packets for one client; holds back what the client may not read, and never waits forever."""

    def __init__(self, name: str, stream: asyncio.StreamWriter) -> None:
        self._name = name
        self._stream = stream

    def write(self, data: bytes) -> None:
        topic = publish_topic(data)
        readable = topic is None or topics.allowed(self._name, topic, publish=False)
        if readable and not self._stream.is_closing():
            self._stream.write(data)

    async def drain(self) -> None:
        try:
            async with asyncio.timeout(WRITE_S):
                await self._stream.drain()
        except TimeoutError:
            event(_log, logging.WARNING, "broker.closed", device=self._name, reason=f"it read nothing for {WRITE_S} s")
            self._stream.transport.abort()
            raise ConnectionResetError from None

    def get_peer_info(self) -> tuple[str, int]:
        return _peer(self._stream)

    def get_ssl_info(self) -> ssl.SSLObject | None:
        found: ssl.SSLObject | None = self._stream.get_extra_info("ssl_object")
        return found

    async def close(self) -> None:
        self._stream.close()


class ClientAuth(BaseAuthPlugin):  # type: ignore[misc]  # amqtt ships no types
    """The gate has checked who it is; a session that did not come through it has no name."""

    async def authenticate(self, *, session: Session) -> bool:
        return bool(session.username) and session.username == session.client_id


class TopicRights(BaseTopicPlugin):  # type: ignore[misc]  # amqtt ships no types
    """A device publishes and reads its own topics only, by `topics.allowed`."""

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool:
        name = str(session.username) if session else ""
        if topics.allowed(name, topic or "", publish=action == Action.PUBLISH):
            return True
        event(_log, logging.WARNING, "broker.refused", device=name, action=action, topic=topic)
        return False


class Gate:
    """Accepts connections in the broker's event loop, and owns them."""

    def __init__(self, broker: Broker, *, secure: bool, is_known: Callable[[str], bool]) -> None:
        self._broker = broker
        self._secure = secure
        self._is_known = is_known
        self._open: dict[str, tuple[asyncio.Task[None], asyncio.StreamWriter]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        task = _this_task()
        self._tasks.add(task)
        name = ""
        try:
            async with asyncio.timeout(CONNECT_S):
                connect = parse_connect(await read_packet(reader))
            name = self._name(writer, connect)
            self._check(name, connect)
            await self._take_over(name, task, writer)
            gated = GatedReader(name, reader, connect), GatedWriter(name, writer)
            await self._broker.external_connected(*gated, LISTENER)
        except ProtocolError as fault:
            event(_log, logging.WARNING, "broker.refused", device=name, peer=_peer(writer)[0], reason=fault)
            writer.write(_NOT_AUTHORIZED)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as fault:
            event(_log, logging.DEBUG, "broker.lost", device=name, peer=_peer(writer)[0], reason=repr(fault))
        finally:
            if self._open.get(name, (None,))[0] is task:
                del self._open[name]
            self._tasks.discard(task)
            writer.close()

    def drop(self, name: str) -> None:
        """End a client's connection, if it has one."""
        if name in self._open:
            self._open[name][1].transport.abort()

    async def close(self, timeout_s: float) -> None:
        """End all connections."""
        for _, writer in self._open.values():
            writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _name(self, writer: asyncio.StreamWriter, connect: Connect) -> str:
        if not self._secure:
            return connect.user
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return common_name(certificate) if certificate else ""

    def _check(self, name: str, connect: Connect) -> None:
        """Raise ProtocolError unless this client may connect so."""
        if name != CLOUD_NAME:
            if not topics.valid_device_name(name):
                raise ProtocolError(f"{name!r} is no device's name")
            if not self._is_known(name):
                raise ProtocolError("the device is not in the registry; enrol it again")
        if connect.will_topic is not None and not topics.allowed(name, connect.will_topic, publish=True):
            raise ProtocolError(f"its last will is for {connect.will_topic!r}, where it may not publish")

    async def _take_over(self, name: str, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        """Let this be the name's connection; the former one ends first, so that its will does not overtake."""
        former = self._open.get(name)
        self._open[name] = (task, writer)
        if former is not None:
            event(_log, logging.INFO, "broker.taken_over", device=name)
            former[1].transport.abort()
            await asyncio.wait({former[0]}, timeout=CONNECT_S)


def make_broker() -> Broker:
    """Return amqtt with our plugins and no socket of its own; to be called in the loop that runs it."""
    for name in _SHOUTERS:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.WARNING)
    plugins: dict[str, dict[str, object]] = {
        f"{one.__module__}.{one.__qualname__}": {} for one in (ClientAuth, TopicRights)
    }
    return Broker(BrokerConfig(listeners={LISTENER: ListenerConfig(type=ListenerType.EXTERNAL)}, plugins=plugins))


def _this_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a connection is served by a task")
    return task


def _peer(writer: asyncio.StreamWriter) -> tuple[str, int]:
    found = writer.get_extra_info("peername") or ("?", 0)
    return str(found[0]), int(found[1])
