"""The two sides of one client's connection to the embedded broker, as amqtt's adapters.

Inwards whole packets only, which the client has a right to send; outwards nothing that it may not read;
and neither side waits forever. The rights are `topics.allowed`; see `cloud.broker.gate` for why here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import NoReturn

from cloud.broker import wire as mqtt_wire
from edgefl.errors import MissingExtra, ProtocolError
from edgefl.logs import event
from edgefl.protocols import topics
from edgefl.protocols.ports.pacing import TokenBucket
from edgefl.protocols.ports.transports import abort
from edgefl.protocols.tls import CLOUD_NAME

try:
    from amqtt.adapters import ReaderAdapter, WriterAdapter
except ImportError as cause:
    raise MissingExtra("the embedded broker", "broker") from cause

WRITE_S = 10.0  # for a receiver to make room
DRAIN_S = 5.0  # for amqtt to deliver what a client sent before it left
LONGEST_KEEPALIVE_S = 300
# A device's share, whatever packets it sends; a healthy one sends a few in a minute.
PACKETS_PER_S, PACKETS_BURST = 200, 1000
BYTES_PER_S, BYTES_BURST = 256 << 10, 2 << 20
PATIENCE_S = 30.0  # with one that is above its share all the time
MAX_FILTERS = 64  # of one connection, whatever it unsubscribes from

_log = logging.getLogger(__name__)


class Share:
    """What one device may send, in packets and in bytes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._packets = TokenBucket(PACKETS_PER_S, PACKETS_BURST, clock)
        self._bytes = TokenBucket(BYTES_PER_S, BYTES_BURST, clock)
        self._above_since_s: float | None = None

    def take(self, size: int) -> float:
        """Count a packet; return for how many seconds nothing is read. Raises ProtocolError where patience ends."""
        wait_s = max(self._packets.take(), self._bytes.take(size))
        now_s = self._clock()
        if wait_s <= 0:
            self._above_since_s = None
        elif self._above_since_s is None:
            self._above_since_s = now_s
        elif now_s - self._above_since_s > PATIENCE_S:
            raise ProtocolError(
                f"for {PATIENCE_S:g} s it sent more than its share of {PACKETS_PER_S} packets and "
                f"{BYTES_PER_S >> 10} kB a second"
            )
        return wait_s


class GatedReader(ReaderAdapter):  # type: ignore[misc]  # amqtt ships no types
    """Gives amqtt one client's packets, whole and rightful ones only; the stream ends with the first fault.

    What a client has no right to is answered here (`answer` writes to it) and goes no further.
    """

    def __init__(
        self, name: str, stream: asyncio.StreamReader, connect: mqtt_wire.Connect, answer: Callable[[bytes], None]
    ) -> None:
        self.client_id = f"{name}#{id(self)}"  # amqtt's sessions never meet
        self._name = name
        self._stream = stream
        self._answer = answer
        self._silence_s = 1.5 * min(connect.keepalive_s or LONGEST_KEEPALIVE_S, LONGEST_KEEPALIVE_S)
        self._packet, self._at = connect.as_client(name, self.client_id), 0
        self._ended = False
        self._undelivered = 0
        self._delivered = asyncio.Event()
        self._num_filters = 0
        self._share = Share(asyncio.get_running_loop().time)

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
        """One PUBLISH of this client has left its queue in amqtt."""
        self._undelivered -= 1
        self._delivered.set()

    async def _next_packet(self) -> None:
        if mqtt_wire.kind(self._packet) == mqtt_wire.DISCONNECT:
            await asyncio.sleep(DRAIN_S)  # amqtt ends the reading; the end of the stream would call out the will
            self._ended = True
        if self._ended:
            raise asyncio.IncompleteReadError(b"", 1)
        try:
            packet = await self._rightful_packet()
        except TimeoutError:  # an OSError too
            await self._end(f"nothing was heard for {self._silence_s:g} s")
        except (ProtocolError, OSError) as fault:
            await self._end(str(fault))
        except asyncio.IncompleteReadError:
            await self._end("")
        if mqtt_wire.kind(packet) == mqtt_wire.DISCONNECT:
            await self._deliver_all()
        self._packet, self._at = packet, 0

    async def _rightful_packet(self) -> bytes:
        while True:
            async with asyncio.timeout(self._silence_s):
                packet = await mqtt_wire.read_packet(self._stream)
            await self._pace(len(packet))
            match mqtt_wire.kind(packet):
                case mqtt_wire.PUBLISH:
                    rightful = self._admit_publish(packet)
                case mqtt_wire.SUBSCRIBE:
                    rightful = self._admit_subscribe(packet)
                case mqtt_wire.CONNECT:
                    raise ProtocolError("a second CONNECT")
                case _:
                    rightful = True
            if rightful:
                return packet

    def _admit_publish(self, packet: bytes) -> bool:
        mqtt_wire.check_publish(packet)
        topic = mqtt_wire.publish_topic(packet)
        if topics.allowed(self._name, topic, publish=True):
            self._undelivered += 1
            return True
        event(_log, logging.WARNING, "broker.refused", device=self._name, action="publish", topic=topic)
        self._answer(mqtt_wire.puback(packet))  # MQTT 3.1.1 has no other answer, as mosquitto does
        return False

    def _admit_subscribe(self, packet: bytes) -> bool:
        filters = mqtt_wire.subscribe_filters(packet)
        self._num_filters += len(filters)
        if self._name != CLOUD_NAME and self._num_filters > MAX_FILTERS:
            raise ProtocolError(f"it subscribes to more than {MAX_FILTERS} filters; a device needs two")
        refused = [one for one in filters if not topics.allowed(self._name, one, publish=False)]
        if not refused:
            return True
        event(_log, logging.WARNING, "broker.refused", device=self._name, action="subscribe", topic=",".join(refused))
        self._answer(mqtt_wire.suback_refused(packet))
        return False

    async def _pace(self, size: int) -> None:
        """Read a device that floods no faster than its share; the cloud has no share."""
        if self._name != CLOUD_NAME:
            await asyncio.sleep(self._share.take(size))  # of 0 s too: others have their turn

    async def _deliver_all(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._undelivered > 0:
                    self._delivered.clear()
                    await self._delivered.wait()

    async def _end(self, reason: str) -> NoReturn:
        if reason:
            event(_log, logging.WARNING, "broker.closed", device=self._name, reason=reason)
        await self._deliver_all()
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
            abort(self._stream.transport)
            raise ConnectionResetError from None

    def get_peer_info(self) -> tuple[str, int]:
        return peer_of(self._stream)

    def get_ssl_info(self) -> ssl.SSLObject | None:
        found: ssl.SSLObject | None = self._stream.get_extra_info("ssl_object")
        return found

    async def close(self) -> None:
        self._stream.close()

    def _may_read(self, topic: str) -> bool:
        return topics.allowed(self._name, topic, publish=False)


def peer_of(writer: asyncio.StreamWriter) -> tuple[str, int]:
    """Return the address and port at the other end."""
    found = writer.get_extra_info("peername") or ("?", 0)
    return str(found[0]), int(found[1])
