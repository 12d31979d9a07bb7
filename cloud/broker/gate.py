"""The door of the embedded broker: who connects, and which packets pass. Behind it works amqtt.

Why not amqtt's own listener and rights (as of 0.12): it only asks for a certificate, deletes the session
of any client id that a stranger names before it has looked at rights, publishes wills unasked, sends each
new client the retained messages of everybody's subscriptions, keeps the dead past their keep-alive, reads
packets of 256 MB, and on DISCONNECT loses what it had acknowledged; and with a topic plugin it loses a
message when another client subscribes at that moment. So we listen ourselves, by TLS 1.3 with our CA's
certificates only, look at each packet, and hand amqtt what is right by its adapters for external listeners.

Invariants: a client is who its certificate says, by name and serial number, and has one connection; the
will of a former one goes out before the next is let in; nothing enters, by PUBLISH, SUBSCRIBE or will, and
no PUBLISH leaves, against `topics.allowed`; what was acknowledged is delivered before the connection ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cloud.broker import wire as mqtt_wire
from cloud.broker.streams import GatedReader, GatedWriter, peer_of
from edgefl.errors import MissingExtra, ProtocolError
from edgefl.logs import event
from edgefl.protocols import topics
from edgefl.protocols.ports.connections import Connection
from edgefl.protocols.ports.transports import abort
from edgefl.protocols.tls import CLOUD_NAME, common_name, serial_number

try:
    from amqtt.broker import Broker
    from amqtt.contexts import BrokerConfig, ListenerConfig, ListenerType
    from amqtt.plugins.base import BaseAuthPlugin
    from amqtt.session import Session
except ImportError as cause:
    raise MissingExtra("the embedded broker", "broker") from cause

CONNECT_S = 10.0  # to say CONNECT after the handshake
LISTENER = "default"

_SHOUTERS = ("amqtt", "transitions")  # they log every packet at INFO

_log = logging.getLogger(__name__)


class GatePlugin(BaseAuthPlugin):  # type: ignore[misc]  # amqtt ships no types
    """Lets in what came through the gate, and tells the gate what amqtt has taken up."""

    @dataclass
    class Config:
        gate: Any  # the Gate whose amqtt this is

    async def authenticate(self, *, session: Session) -> bool:
        return bool(self.config.gate.has(session.client_id))

    async def on_broker_message_received(self, *, client_id: str, **_: object) -> None:
        self.config.gate.note_delivery(client_id)


class QuietBroker(Broker):  # type: ignore[misc]  # amqtt ships no types
    """Amqtt, less one fault: it offers each new client what is retained for everybody's subscriptions.

    Those would be held back at the gate; but amqtt trips over who subscribes while it offers them.
    """

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        if any(one.client_id == session.client_id for one, _ in self.subscriptions.get(subscription[0], ())):
            await super()._publish_retained_messages_for_subscription(subscription, session)


class Gate:
    """Accepts connections in the broker's event loop, owns them, and owns amqtt behind."""

    def __init__(self, *, secure: bool, is_known: Callable[[str, str | None], bool], max_devices: int) -> None:
        self._secure = secure
        self._max_devices = max_devices
        self._is_known = is_known
        self._broker = _make_broker(self)
        self._open: dict[str, tuple[asyncio.Task[None], asyncio.StreamWriter]] = {}
        self._readers: dict[str, GatedReader] = {}
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # named or not yet

    async def start(self) -> None:
        await self._broker.start()

    @property
    def broadcasting(self) -> asyncio.Future[Any]:
        """What passes messages on, in amqtt; were it to end, nobody would hear anything, or of it."""
        task: asyncio.Future[Any] = self._broker._broadcast_task  # noqa: SLF001 - amqtt tells nobody
        return task

    async def accept(self, place: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        task, peer, name = _this_task(), peer_of(writer)[0], ""
        self._connections[task] = writer
        try:
            async with asyncio.timeout(CONNECT_S):
                connect = mqtt_wire.parse_connect(await mqtt_wire.read_packet(reader, mqtt_wire.CONNECT))
            name, serial = self._identify(writer, connect)
            self._check(name, serial, connect)
            if self._is_full_for(name):
                event(_log, logging.WARNING, "device.no_seat", device=name, seats=self._max_devices)
                writer.write(mqtt_wire.SERVER_UNAVAILABLE)
                return
            place.serve()
            await self._take_over(name, task, writer)
            await self._hand_over(GatedReader(name, reader, connect, writer.write), GatedWriter(name, writer))
        except ProtocolError as fault:
            event(_log, logging.WARNING, "broker.refused", device=name, peer=peer, reason=fault)
            writer.write(mqtt_wire.NOT_AUTHORIZED)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as fault:
            event(_log, logging.DEBUG, "broker.lost", device=name, peer=peer, reason=repr(fault))
        finally:
            del self._connections[task]
            if name in self._open and self._open[name][0] is task:
                del self._open[name]
            writer.close()

    def has(self, client_id: str) -> bool:
        """Whether this client of amqtt's came in by the gate."""
        return client_id in self._readers

    def note_delivery(self, client_id: str) -> None:
        """Amqtt has taken up a message that came from this client."""
        if client_id in self._readers:
            self._readers[client_id].note_delivery()

    async def drop(self, name: str) -> None:
        """End a client's connection, if it has one; returns when its last will has gone out."""
        if name in self._open:
            task, writer = self._open[name]
            event(_log, logging.INFO, "broker.dropped", device=name)
            abort(writer.transport)
            await asyncio.wait({task}, timeout=CONNECT_S)

    async def close(self, timeout_s: float) -> None:
        """End all connections, then amqtt."""
        for writer in self._connections.values():
            abort(writer.transport)
        if self._connections:
            await asyncio.wait(self._connections.keys(), timeout=timeout_s)
        # A message in flight to a client that has gone can cancel amqtt's own shutdown, or hold it up.
        ending = asyncio.create_task(self._broker.shutdown(), name="amqtt-shutdown")
        await asyncio.wait({ending}, timeout=timeout_s)
        if ending.done() and not ending.cancelled() and (fault := ending.exception()):
            event(_log, logging.WARNING, "broker.shutdown", reason=repr(fault))

    async def _hand_over(self, reader: GatedReader, writer: GatedWriter) -> None:
        self._readers[reader.client_id] = reader
        try:
            await self._broker.external_connected(reader, writer, LISTENER)
        finally:
            del self._readers[reader.client_id]

    def _identify(self, writer: asyncio.StreamWriter, connect: mqtt_wire.Connect) -> tuple[str, str | None]:
        """Return the client's name and its certificate's serial number."""
        if not self._secure:
            return connect.user, None
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return (common_name(certificate), serial_number(certificate)) if certificate else ("", None)

    def _check(self, name: str, serial: str | None, connect: mqtt_wire.Connect) -> None:
        """Raise ProtocolError unless this client may connect so."""
        if name != CLOUD_NAME:
            if not topics.valid_device_name(name):
                raise ProtocolError(f"{name!r} is no device's name")
            if not self._is_known(name, serial):
                raise ProtocolError("the device is not of this fleet, or not with this certificate; enrol it again")
        if connect.will_topic is not None and not topics.allowed(name, connect.will_topic, publish=True):
            raise ProtocolError(f"its last will is for {connect.will_topic!r}, where it may not publish")

    def _is_full_for(self, name: str) -> bool:
        return name not in {CLOUD_NAME, *self._open} and len(self._open.keys() - {CLOUD_NAME}) >= self._max_devices

    async def _take_over(self, name: str, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        """Let this be the name's connection; the former one ends first, so that its will does not overtake."""
        former = self._open.get(name)
        self._open[name] = (task, writer)
        if former is not None:
            event(_log, logging.INFO, "broker.taken_over", device=name)
            abort(former[1].transport)
            await asyncio.wait({former[0]}, timeout=CONNECT_S)


def _make_broker(gate: Gate) -> Broker:
    """Return amqtt with our plugins and no socket of its own."""
    for name in _SHOUTERS:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.WARNING)
    plugins: dict[str, dict[str, object]] = {f"{GatePlugin.__module__}.{GatePlugin.__qualname__}": {"gate": gate}}
    return QuietBroker(BrokerConfig(listeners={LISTENER: ListenerConfig(type=ListenerType.EXTERNAL)}, plugins=plugins))


def _this_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a connection is served by a task")
    return task
