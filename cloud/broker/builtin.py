"""The built-in broker: MQTT 3.1.1 in the cloud's event loop, for machines without mosquitto.

It has the same access rights as the configured mosquitto: TLS 1.3 with a certificate of the fleet, which identifies
the client by name and serial number; one connection per client; a device publishes and receives only what
`topics.allowed` permits. All state is in memory: after a restart each device publishes its state again.
Invariants: packets of any kind are read no faster than the client's share; the will of an old connection is published
before a new connection of the same client is accepted; a removed device loses its connection and session at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Self

from cloud.broker import packets
from cloud.broker.packets import Connect, packet
from cloud.broker.sessions import Session, Sessions
from cloud.broker.share import Share
from cloud.shares import PortShare
from edgefl.errors import ConfigError, PartFailed, ProtocolError
from edgefl.logs import event
from edgefl.protocols.addresses import bracketed, is_loopback
from edgefl.protocols.ports.connections import Connection, Connections
from edgefl.protocols.ports.listener import Listener, Port, listen
from edgefl.protocols.ports.transports import abort
from edgefl.protocols.tls import CLOUD_NAME, Identity, common_name, reloading, serial_number, server_context
from edgefl.protocols.topics import allowed, valid_device_name

LONGEST_KEEPALIVE_S = 300
WRITE_S = 10.0  # a client that reads nothing for this long is disconnected
MAX_FILTERS = 64  # per connection of a device, which needs two; an UNSUBSCRIBE gives none back
WRONG_ID, NO_PLACE, NOT_AUTHORIZED = 2, 3, 5  # return codes of a CONNACK

_log = logging.getLogger(__name__)


class BuiltinBroker:
    """A broker, as an async context manager; `drop` and `refresh` may be called from any thread.

    `identity` None is the insecure mode, for loopback only: the user name identifies a client.
    `is_known` returns whether a device is still enrolled with a certificate of this serial number (None in insecure
    mode); it is called in a thread, at each connect. Port 0 uses a free port, given by `port` and `url`.
    """

    program = "builtin"
    reason = ""  # never unhealthy: if it fails, the cloud stops

    def __init__(  # noqa: PLR0913 - the parts of a broker
        self, identity: Identity | None, host: str, port: int, *, is_known: Callable[[str, str | None], bool],
        share: PortShare, on_failure: Callable[[BaseException], None], owner: str = CLOUD_NAME,
    ) -> None:  # fmt: skip
        if identity is None and not is_loopback(host):
            raise ConfigError(f"a broker without TLS may listen on loopback only, not on {host!r}; drop --insecure")
        self.port, self.is_known, self.max_devices = port, is_known, share.seats
        self.owner = owner  # the cloud, or the region whose broker this is: it may publish and read everything
        self.sessions = Sessions()
        self.open: dict[str, _Client] = {}
        self.all: set[_Client] = set()  # also those without a name yet
        self.admissions: set[asyncio.Task[None]] = set()
        self._identity, self._host, self._limits, self._on_failure = identity, host, share.limits(), on_failure
        self._reload: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        """The URL for clients on this machine."""
        return f"{'mqtts' if self._identity else 'mqtt'}://{bracketed(self._host)}:{self.port}"

    async def __aenter__(self) -> Self:
        """Listen; raises ConfigError if the port is in use."""
        self._loop = asyncio.get_running_loop()
        listening = listen(self._host, self.port, "--mqtt-port")
        context = None
        if self._identity is not None:
            context = server_context(self._identity, client_certificates=True)
            self._reload = reloading(context, self._identity)
        port = Port(name="mqtt", socket=listening, context=(lambda: context) if context else None)
        connections = Connections(self._limits, self._loop.time)
        self._listener = Listener(port, connections, lambda place: _Client(self, place))
        self._listener.start()
        for task in self._listener.tasks:
            task.add_done_callback(self._note_end)
        self.port = self._listener.port_number
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self.admissions:
            task.cancel()
        for connection in tuple(self.all):
            connection.end("")
        await self._listener.wait_closed()

    def drop(self, device: str) -> None:
        """End a device's connection and session; it cannot come back if `is_known` returns False."""
        self._loop.call_soon_threadsafe(self._drop, device)

    def refresh(self) -> None:
        """Reload the certificate file, for handshakes from now on."""
        self._loop.call_soon_threadsafe(self._reload)

    def _drop(self, device: str) -> None:
        if device in self.open:
            event(_log, logging.INFO, "broker.dropped", device=device)
            self.open[device].end("")
        self.sessions.forget(device)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self._on_failure(PartFailed(f"a task of the built-in broker failed: {task.exception()!r}"))


class _Client(asyncio.Protocol):
    """One client's connection, from the end of the TLS handshake until it is lost."""

    def __init__(self, broker: BuiltinBroker, place: Connection) -> None:
        self._broker, self._place = broker, place
        self._loop = asyncio.get_running_loop()
        self._data = bytearray()
        self._is_paused = False  # received packets are not processed, and no more is read
        self._name = ""
        self._session: Session | None = None
        self._connect: Connect | None = None
        self._share = Share(self._loop.time)
        self._num_filters = 0
        self._received_s = self._loop.time()
        self._alive: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - asyncio's promise
        self._transport = transport
        self._broker.all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self.end("")
        self._place.leave()

    def pause_writing(self) -> None:
        self._stuck = self._loop.call_later(WRITE_S, self.end, f"it read nothing for {WRITE_S:g} s")
        if self._session is not None:
            self._session.pause()

    def resume_writing(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
        if self._session is not None:
            self._session.resume(self._transport.write, again=False)

    def data_received(self, data: bytes) -> None:
        self._received_s = self._loop.time()
        self._data += data
        self._work()

    def end(self, reason: str, *, disconnected: bool = False) -> None:
        """Close at once, and publish the will unless the client has sent DISCONNECT. May be called again."""
        if reason:
            event(_log, logging.WARNING, "broker.closed", device=self._name, reason=reason)
        session, self._session = self._session, None
        for timer in (self._alive, self._stuck):
            if timer is not None:
                timer.cancel()
        if session is not None and self._connect is not None:
            session.pause()
            del self._broker.open[self._name]
            if self._connect.clean:
                self._broker.sessions.forget(self._name)
            if self._connect.will is not None and not disconnected:
                self._broker.sessions.publish(self._connect.will)
        self._broker.all.discard(self)
        self._is_paused = True
        if disconnected:
            self._transport.close()
        else:
            abort(self._transport)

    def _work(self) -> None:
        """Process the received packets within the client's share; above it, pause reading."""
        try:
            while not self._is_paused and (found := packets.cut(self._data, first=self._connect is None)):
                self._take(*found)
                wait_s = 0.0 if self._name == self._broker.owner else self._share.take(2 + len(found[2]))
                if wait_s > 0 and not self._is_paused:
                    self._pause()
                    self._loop.call_later(wait_s, self._resume)
        except ProtocolError as fault:
            self.end(str(fault))

    def _pause(self) -> None:
        self._is_paused = True
        self._transport.pause_reading()

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()
            self._work()

    def _take(self, kind: int, flags: int, body: bytes) -> None:
        session = self._session
        if session is None:
            self._pause()
            self._connect = packets.parse_connect(body)
            task = self._loop.create_task(self._admit(self._connect), name="mqtt-admission")
            self._broker.admissions.add(task)
            task.add_done_callback(self._broker.admissions.discard)
            return
        match kind:
            case packets.PUBLISH:
                self._publish(session, flags, body)
            case packets.PUBREL:
                number = packets.Fields(body).number()
                session.received.discard(number)
                self._send(packets.acknowledgement(packets.PUBCOMP, number))
            case packets.PUBACK | packets.PUBREC | packets.PUBCOMP:
                session.acknowledge(kind, packets.Fields(body).number())
            case packets.SUBSCRIBE:
                self._subscribe(session, body)
            case packets.UNSUBSCRIBE:
                number, filters = packets.parse_subscribe(body, with_qos=False)
                for filter_, _ in filters:
                    self._broker.sessions.unsubscribe(session, filter_)
                self._send(packets.acknowledgement(packets.UNSUBACK, number))
            case packets.PINGREQ:
                self._send(packet(packets.PINGRESP))
            case packets.DISCONNECT:
                self.end("", disconnected=True)
            case _:
                raise ProtocolError(f"unexpected packet of type {kind}")

    async def _admit(self, connect: Connect) -> None:
        self._name, serial = self._identify(connect)
        reason = await self._refusal(connect, serial)
        seats = self._broker.open.keys() - {self._broker.owner}
        if reason:
            event(_log, logging.WARNING, "broker.refused", device=self._name, peer=self._place.source, reason=reason)
            self._refuse(NOT_AUTHORIZED)
        elif not connect.client_id and not connect.clean:
            self._refuse(WRONG_ID)
        elif self._name not in {self._broker.owner, *seats} and len(seats) >= self._broker.max_devices:
            event(_log, logging.WARNING, "device.no_seat", device=self._name, seats=self._broker.max_devices)
            self._refuse(NO_PLACE)
        elif not self._transport.is_closing():
            self._welcome(connect)

    async def _refusal(self, connect: Connect, serial: str | None) -> str:
        """Return why this client may not connect; empty if it may."""
        if self._name != self._broker.owner and not valid_device_name(self._name):
            return f"{self._name!r} is not a valid device name"
        if connect.will is not None and not self._may(connect.will.topic, publish=True):
            return f"it may not publish its will on {connect.will.topic!r}"
        if self._name != self._broker.owner and not await asyncio.to_thread(self._broker.is_known, self._name, serial):
            return "the device is not enrolled, or not with this certificate; enrol it again"
        return ""

    def _identify(self, connect: Connect) -> tuple[str, str | None]:
        """Return the client's name and its certificate's serial number."""
        secure = self._transport.get_extra_info("ssl_object")
        if secure is None:
            return connect.user, None
        certificate = secure.getpeercert(binary_form=True)
        return common_name(certificate), serial_number(certificate)

    def _refuse(self, code: int) -> None:
        self._send(packet(packets.CONNACK, bytes([0, code])))
        self._transport.close()

    def _welcome(self, connect: Connect) -> None:
        if self._name in self._broker.open:
            event(_log, logging.INFO, "broker.taken_over", device=self._name)
            self._broker.open[self._name].end("")
        self._place.serve()
        self._broker.open[self._name] = self
        self._session, was_here = self._broker.sessions.open(self._name, clean=connect.clean)
        self._send(packet(packets.CONNACK, bytes([was_here, 0])))
        self._session.resume(self._transport.write, again=True)
        self._check_alive()
        self._resume()

    def _check_alive(self) -> None:
        """Disconnect a client that has sent nothing for one and a half times its keep-alive."""
        keepalive_s = self._connect.keepalive_s if self._connect else 0
        limit_s = 1.5 * min(keepalive_s or LONGEST_KEEPALIVE_S, LONGEST_KEEPALIVE_S)
        silent_s = self._loop.time() - self._received_s
        if silent_s < limit_s:
            self._alive = self._loop.call_later(limit_s - silent_s, self._check_alive)
        else:
            self.end(f"it sent nothing for {limit_s:g} s")

    def _publish(self, session: Session, flags: int, body: bytes) -> None:
        message, number = packets.parse_publish(flags, body)
        if not self._may(message.topic, publish=True):  # acknowledged, because MQTT 3.1.1 has no refusal
            event(_log, logging.WARNING, "broker.refused", device=self._name, action="publish", topic=message.topic)
        elif message.qos < 2 or number not in session.received:
            self._broker.sessions.publish(message)
        if message.qos == 2:
            session.received.add(number)
        if message.qos:
            kind = packets.PUBACK if message.qos == 1 else packets.PUBREC
            self._send(packets.acknowledgement(kind, number))

    def _subscribe(self, session: Session, body: bytes) -> None:
        number, filters = packets.parse_subscribe(body, with_qos=True)
        self._num_filters += len(filters)
        if self._name != self._broker.owner and self._num_filters > MAX_FILTERS:
            raise ProtocolError(f"it subscribed to more than {MAX_FILTERS} filters; a device needs two")
        may = [self._may(filter_, publish=False) for filter_, _ in filters]
        if refused := [filter_ for (filter_, _), yes in zip(filters, may, strict=True) if not yes]:
            event(
                _log, logging.WARNING, "broker.refused", device=self._name, action="subscribe", topic=",".join(refused)
            )
        codes = bytes(qos if yes else 0x80 for (_, qos), yes in zip(filters, may, strict=True))
        self._send(packet(packets.SUBACK, number.to_bytes(2) + codes))
        for (filter_, qos), yes in zip(filters, may, strict=True):
            if yes:
                self._broker.sessions.subscribe(session, filter_, qos)

    def _may(self, topic: str, *, publish: bool) -> bool:
        name = CLOUD_NAME if self._name == self._broker.owner else self._name
        return allowed(name, topic, publish=publish)

    def _send(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)
