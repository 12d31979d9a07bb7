"""The door of the embedded broker: who connects, and which bytes pass. Behind it works amqtt.

Why not amqtt's own listener (as of 0.12): it only asks for a certificate, deletes the session of any
client id that a stranger names before it has looked at rights, publishes wills unasked, sends each new
client the retained messages of everybody's subscriptions, keeps the dead past their keep-alive, reads
packets of 256 MB, queues without bound, and on DISCONNECT loses what it had acknowledged. So we listen
ourselves, by TLS 1.3 with our CA's certificates only, and hand amqtt checked connections through its
adapters for external listeners; its plugins ask for topic rights.

Invariants: user name and client id are the certificate's CN, whatever the client says; a name has one
connection, and the will of the former goes out before the latter is let in; no PUBLISH leaves on a
topic that its receiver may not read; what was acknowledged is delivered before the connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from cloud import mqtt_wire
from edgefl.errors import MissingExtra, ProtocolError
from edgefl.logs import event
from edgefl.protocols import topics
from edgefl.protocols.tls import CLOUD_NAME, common_name

try:
    from amqtt.adapters import ReaderAdapter, WriterAdapter
    from amqtt.broker import Broker
    from amqtt.contexts import Action, BrokerConfig, ListenerConfig, ListenerType
    from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
    from amqtt.session import Session
except ImportError as cause:
    raise MissingExtra("the embedded broker", "broker") from cause

CONNECT_S = 10.0  # to say CONNECT after the handshake
WRITE_S = 10.0  # for a receiver to make room
DRAIN_S = 5.0  # for amqtt to deliver what a client sent before it left
MAX_UNDELIVERED = 1000  # messages of one client inside amqtt; then it is not read for a while
LONGEST_KEEPALIVE_S = 300
LISTENER = "default"


_SHOUTERS = ("amqtt", "transitions")  # they log every packet at INFO

_log = logging.getLogger(__name__)


class GatedReader(ReaderAdapter):  # type: ignore[misc]  # amqtt ships no types
    """Gives amqtt one client's packets, whole and sane ones only; the stream ends with the first fault."""

    def __init__(self, name: str, stream: asyncio.StreamReader, connect: mqtt_wire.Connect) -> None:
        self._name = name
        self._stream = stream
        self._silence_s = 1.5 * min(connect.keepalive_s or LONGEST_KEEPALIVE_S, LONGEST_KEEPALIVE_S)
        self._packet, self._at = connect.as_client(name), 0
        self._ended = False
        self._undelivered = 0
        self._delivered = asyncio.Event()

    async def read(self, n: int = -1) -> bytes:
        if self._at == len(self._packet):
            await self._next_packet()
        end = self._at + n if n >= 0 else len(self._packet)
        if end > len(self._packet):
            await self._end("a packet ends before its fields do")
        chunk, self._at = self._packet[self._at : end], end
        return chunk

    def feed_eof(self) -> None:
        self._ended = True

    def note_delivery(self) -> None:
        """One PUBLISH of this client has left amqtt's queue."""
        self._undelivered -= 1
        self._delivered.set()

    async def _next_packet(self) -> None:
        if mqtt_wire.kind(self._packet) == mqtt_wire.DISCONNECT:
            await asyncio.sleep(DRAIN_S)  # amqtt ends the reading; the end of the stream would call out the will
            self._ended = True
        if self._ended:
            raise asyncio.IncompleteReadError(b"", 1)
        try:
            async with asyncio.timeout(self._silence_s):
                packet = await mqtt_wire.read_packet(self._stream)
            if mqtt_wire.kind(packet) == mqtt_wire.PUBLISH:
                mqtt_wire.check_publish(packet)
                await self._deliver_down_to(MAX_UNDELIVERED)
                self._undelivered += 1
            elif mqtt_wire.kind(packet) == mqtt_wire.DISCONNECT:
                await self._deliver_down_to(0)
        except TimeoutError:  # an OSError too
            await self._end(f"nothing was heard for {self._silence_s:g} s")
        except (ProtocolError, OSError) as fault:
            await self._end(str(fault))
        except asyncio.IncompleteReadError:
            await self._end("")
        self._packet, self._at = packet, 0

    async def _deliver_down_to(self, limit: int) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._undelivered > limit:
                    self._delivered.clear()
                    await self._delivered.wait()

    async def _end(self, reason: str) -> NoReturn:
        if reason:
            event(_log, logging.WARNING, "broker.closed", device=self._name, reason=reason)
        await self._deliver_down_to(0)
        self._ended = True
        self._at = len(self._packet)
        raise asyncio.IncompleteReadError(b"", 1)


class GatedWriter(WriterAdapter):  # type: ignore[misc]  # amqtt ships no types
    """Takes amqtt's packets for one client; holds back what the client may not read, and never waits forever."""

    def __init__(self, name: str, stream: asyncio.StreamWriter) -> None:
        self._name = name
        self._stream = stream

    def write(self, data: bytes) -> None:
        if self._stream.is_closing():
            return
        if mqtt_wire.kind(data) != mqtt_wire.PUBLISH or self._may_read(mqtt_wire.publish_topic(data)):
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

    def _may_read(self, topic: str) -> bool:
        return topics.allowed(self._name, topic, publish=False)


class ClientAuth(BaseAuthPlugin):  # type: ignore[misc]  # amqtt ships no types
    """The gate has checked who it is; a session that did not come through it has no name."""

    async def authenticate(self, *, session: Session) -> bool:
        return bool(session.username) and session.username == session.client_id


class TopicRights(BaseTopicPlugin):  # type: ignore[misc]  # amqtt ships no types
    """A device publishes and reads its own topics only, by `topics.allowed`."""

    @dataclass
    class Config:
        gate: Any  # the Gate whose amqtt this is

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool:
        name = str(session.username) if session else ""
        if session and action == Action.PUBLISH:
            self.config.gate.note_delivery((session.remote_address, session.remote_port))
        if topics.allowed(name, topic or "", publish=action == Action.PUBLISH):
            return True
        event(_log, logging.WARNING, "broker.refused", device=name, action=action, topic=topic)
        return False


class Gate:
    """Accepts connections in the broker's event loop, owns them, and owns amqtt behind."""

    def __init__(self, *, secure: bool, is_known: Callable[[str], bool]) -> None:
        self._secure = secure
        self._is_known = is_known
        self._broker = _make_broker(self)
        self._open: dict[str, tuple[asyncio.Task[None], asyncio.StreamWriter]] = {}
        self._readers: dict[tuple[str, int], GatedReader] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._broker.start()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        task, peer, name = _this_task(), _peer(writer), ""
        self._tasks.add(task)
        try:
            async with asyncio.timeout(CONNECT_S):
                connect = mqtt_wire.parse_connect(await mqtt_wire.read_packet(reader, mqtt_wire.CONNECT))
            name = self._name(writer, connect)
            self._check(name, connect)
            await self._take_over(name, task, writer)
            self._readers[peer] = GatedReader(name, reader, connect)
            await self._broker.external_connected(self._readers[peer], GatedWriter(name, writer), LISTENER)
        except ProtocolError as fault:
            event(_log, logging.WARNING, "broker.refused", device=name, peer=peer[0], reason=fault)
            writer.write(mqtt_wire.NOT_AUTHORIZED)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as fault:
            event(_log, logging.DEBUG, "broker.lost", device=name, peer=peer[0], reason=repr(fault))
        finally:
            self._leave(name, task, peer)
            writer.close()

    def note_delivery(self, peer: tuple[str, int]) -> None:
        """Amqtt has taken up a message that came from this peer."""
        if peer in self._readers:
            self._readers[peer].note_delivery()

    def drop(self, name: str) -> None:
        """End a client's connection, if it has one."""
        if name in self._open:
            self._open[name][1].transport.abort()

    async def close(self, timeout_s: float) -> None:
        """End all connections, then amqtt."""
        for _, writer in self._open.values():
            writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        await asyncio.wait_for(self._broker.shutdown(), timeout_s)

    def _leave(self, name: str, task: asyncio.Task[None], peer: tuple[str, int]) -> None:
        self._tasks.discard(task)
        self._readers.pop(peer, None)
        if name in self._open and self._open[name][0] is task:
            del self._open[name]

    def _name(self, writer: asyncio.StreamWriter, connect: mqtt_wire.Connect) -> str:
        if not self._secure:
            return connect.user
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return common_name(certificate) if certificate else ""

    def _check(self, name: str, connect: mqtt_wire.Connect) -> None:
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


def _make_broker(gate: Gate) -> Broker:
    """Return amqtt with our plugins and no socket of its own."""
    for name in _SHOUTERS:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.WARNING)
    plugins: dict[str, dict[str, object]] = {_path(ClientAuth): {}, _path(TopicRights): {"gate": gate}}
    return Broker(BrokerConfig(listeners={LISTENER: ListenerConfig(type=ListenerType.EXTERNAL)}, plugins=plugins))


def _path(plugin: type) -> str:
    return f"{plugin.__module__}.{plugin.__qualname__}"


def _this_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a connection is served by a task")
    return task


def _peer(writer: asyncio.StreamWriter) -> tuple[str, int]:
    found = writer.get_extra_info("peername") or ("?", 0)
    return str(found[0]), int(found[1])
