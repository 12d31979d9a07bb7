"""A reconnecting MQTT link for the agent and the cloud: aiomqtt in their event loop.

Each connection is a clean MQTT 3.1.1 session with a new client: a lost message costs latency only, because the agent
calls `Next` over gRPC on each connect.

Invariants: callbacks run in the event loop and must return quickly; `publish` never blocks, and may be called from
any thread; a message of QoS 1 stays queued until the broker has acknowledged it, so it may arrive twice; `on_connect`
is called on every connect, after the subscriptions are acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from edgefl.errors import CloudUnreachable, MissingExtra, ProtocolError
from edgefl.logs import event
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.link_config import LinkConfig, Will, parse_url
from edgefl.protocols.messages import MAX_MESSAGE_BYTES
from edgefl.protocols.tls import client_context

try:
    import aiomqtt
    from aiomqtt import MqttError
    from aiomqtt.exceptions import MqttConnectError
except ImportError as cause:
    raise MissingExtra("the MQTT link", "agent") from cause

__all__ = ["LinkConfig", "MqttError", "MqttLink", "Will", "new_client", "parse_url"]

MAX_QUEUED = 10_000  # messages that the broker has not acknowledged
MAX_IN_FLIGHT = 200
FIRST_DELAY_S, LAST_DELAY_S = 0.2, 2.0  # between attempts to connect; doubles
MAX_FAULTS, FAULTS_S = 5, 60.0  # the link fails at this number of unexpected errors within this time
ANSWER_S = 3.0  # for a CONNACK or a SUBACK
END_S = 10.0  # `close` waits this long for an attempt to connect
SERVER_UNAVAILABLE = 0x88  # paho's number for return code 3 of a CONNACK: no free place

_log = logging.getLogger(__name__)
_paho_log = logging.getLogger(f"{__name__}.paho")
_paho_log.setLevel(logging.CRITICAL)  # the link itself logs why it is down, once


def _nothing(*_: object) -> None:
    pass


class MqttLink:
    """A reconnecting connection, as a task of the event loop in which `start` is called.

    An error in `on_message` affects that message only: a ProtocolError is logged with its topic, any other error,
    which is a bug, with its traceback. After an error elsewhere the link reconnects; at the MAX_FAULTS-th within
    FAULTS_S it fails: it calls `on_failure`, and `publish` and `wait_connected` raise the error from then on.
    """

    def __init__(
        self, config: LinkConfig, *, on_failure: Callable[[BaseException], None],
        on_message: Callable[[str, bytes], None] = _nothing, on_connect: Callable[[], None] = _nothing,
        on_disconnect: Callable[[], None] = _nothing,
    ) -> None:  # fmt: skip
        self._config, self._client_id = config, config.client_id
        self._on_message, self._on_connect = on_message, on_connect
        self._on_disconnect, self._on_failure = on_disconnect, on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._queue: deque[tuple[str, bytes, int, bool]] = deque()  # topic, payload, QoS, retained
        self._queued, self._sent, self._leave, self._up_or_failed = (asyncio.Event() for _ in range(4))
        self._is_closed = False
        self._failure: BaseException | None = None
        self._reason = ""  # why the link is down, or will be
        self._backoff = Backoff(FIRST_DELAY_S, LAST_DELAY_S, config.client_id)
        self._faults_s: deque[float] = deque(maxlen=MAX_FAULTS)

    @property
    def is_up(self) -> bool:
        """Whether the link is connected, and its subscriptions are acknowledged."""
        return self._up_or_failed.is_set() and self._failure is None

    @property
    def reason(self) -> str:
        """Why the link is down, as a text; empty while it is up."""
        return "" if self.is_up else self._reason or "it has not connected yet"

    def start(self) -> None:
        """Start connecting; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._end_idle_threads(self._loop)
        self._task = self._loop.create_task(self._run(), name=f"mqtt-{self._client_id}")

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the link is up; False at the timeout."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._up_or_failed.wait(), timeout_s)
        self._raise_failure()
        return self.is_up

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Queue a message. QoS 1 survives a lost connection; QoS 0 is dropped if there is no connection.

        Raises ProtocolError if it is too large, CloudUnreachable if the queue is full or the link closed.
        """
        self._raise_failure()
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"message on {topic} has {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
        if self._is_closed:
            raise CloudUnreachable(f"{self._client_id}: the link to {self._config.url} is closed")
        if not qos and not self.is_up:
            event(_log, logging.DEBUG, "mqtt.dropped", topic=topic, reason=self.reason)
            return
        if len(self._queue) >= MAX_QUEUED:
            raise CloudUnreachable(
                f"{self._client_id}: {MAX_QUEUED} messages are waiting for broker {self._config.url} ({self.reason}); "
                f"the new one on {topic} was not queued"
            )
        self._queue.append((topic, payload, qos, retain))
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, because the process is stopping
                self._loop.call_soon_threadsafe(self._queued.set)

    def reconnect(self, reason: str) -> None:
        """Disconnect without a will and reconnect at once; queued messages are sent then."""
        self._reason = reason
        self._leave.set()

    async def close(self, flush_s: float = 2.0) -> None:
        """Wait up to `flush_s` for acknowledgements, disconnect without a will, and end the task."""
        with suppress(TimeoutError):
            async with asyncio.timeout(flush_s):
                while self._queue and self.is_up:
                    self._sent.clear()
                    await self._sent.wait()
        self._is_closed = True
        self._leave.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=END_S)
            self._task.cancel()

    def unsent(self) -> list[tuple[str, bytes, int, bool]]:
        """Return the messages that the broker has not acknowledged: topic, payload, QoS, whether it is retained."""
        return list(self._queue)

    async def _run(self) -> None:
        try:
            while not self._is_closed:
                self._leave.clear()
                try:
                    is_full = await self._connect_once()
                finally:
                    self._go_down()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._leave.wait(), self._backoff.next_s(full=is_full))
        except Exception as failure:  # noqa: BLE001 - the task's outermost line
            self._failure = failure
            self._up_or_failed.set()  # so that waiting callers raise it
            self._on_failure(failure)

    async def _connect_once(self) -> bool:
        """Connect, and serve the connection until it ends; returns whether the broker has no free place.

        Unexpected errors are logged, unless there were too many recently.
        """
        try:
            tls, will = await asyncio.to_thread(self._prepare)
            async with new_client(self._config, tls, will) as client:
                self._end_idle_threads(asyncio.get_running_loop())
                await self._serve(client)
        except MqttConnectError as refusal:
            self._note_down(f"the broker refused client {self._client_id!r}: {refusal.rc}")
            return getattr(refusal.rc, "value", 0) == SERVER_UNAVAILABLE
        except MqttError as lost:
            self._note_down(str(lost.__cause__ or lost))
        except Exception as fault:
            now_s = asyncio.get_running_loop().time()
            self._faults_s.append(now_s)
            if len(self._faults_s) == MAX_FAULTS and now_s - self._faults_s[0] < FAULTS_S:
                raise
            _log.exception("mqtt.fault client=%s: it reconnects", self._client_id)
            self._note_down(f"an error in this program: {fault!r}")
        return False

    def _prepare(self) -> tuple[ssl.SSLContext | None, tuple[str, bytes] | None]:
        """Return a TLS context from the certificate's file, which may have been renewed, and the next will."""
        identity, will = self._config.identity, self._config.will
        try:
            tls = client_context(identity.ca, identity, self._config.server_name) if identity else None
        except OSError as cause:
            raise MqttError(f"our own certificate cannot be used: {cause}") from None
        return tls, will() if will else None

    async def _serve(self, client: aiomqtt.Client) -> None:
        """Subscribe, then receive and send until the connection is lost or `_leave` is set."""
        if self._config.subscriptions:
            codes: Any = await client.subscribe(list(self._config.subscriptions))
            topics = (topic for topic, _ in self._config.subscriptions)
            if refused := [topic for topic, code in zip(topics, codes, strict=False) if code.is_failure]:
                raise MqttError(f"the broker refused subscriptions to {', '.join(refused)}")
        self._come_up()
        work = (self._receive(client), self._send(client), self._leave.wait())
        tasks = [asyncio.ensure_future(one) for one in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _cancelled(tasks)

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic, payload = message.topic.value, message.payload
            try:
                self._on_message(topic, payload)
            except ProtocolError as fault:
                event(_log, logging.WARNING, "mqtt.bad_message", topic=topic, reason=fault)
            except Exception:  # noqa: BLE001 - a bug costs only the message that triggers it
                _log.critical("mqtt.message_lost topic=%r bytes=%d", topic, len(payload), exc_info=True)

    async def _send(self, client: aiomqtt.Client) -> None:
        """Send queued messages, MAX_IN_FLIGHT at a time; acknowledged ones leave the queue."""
        while True:
            self._queued.clear()
            while num := min(len(self._queue), MAX_IN_FLIGHT):
                batch = [self._queue[n] for n in range(num)]
                sending = [asyncio.ensure_future(client.publish(*message, timeout=math.inf)) for message in batch]
                try:
                    await asyncio.gather(*sending)
                finally:
                    await _cancelled(sending)
                for _ in sending:
                    self._queue.popleft()
                self._sent.set()
            await self._queued.wait()

    def _come_up(self) -> None:
        self._backoff.reset()
        event(_log, logging.INFO, "mqtt.up", client=self._client_id, broker=self._config.url)
        self._on_connect()
        self._reason = ""
        self._up_or_failed.set()

    def _go_down(self) -> None:
        was_up = self.is_up
        self._up_or_failed.clear()
        self._sent.set()
        if was_up:
            self._on_disconnect()

    def _note_down(self, reason: str) -> None:
        """Log why the link is down, each reason once."""
        if not self._is_closed:
            level = logging.DEBUG if reason == self._reason else logging.WARNING
            self._reason = reason
            event(_log, level, "mqtt.down", client=self._client_id, broker=self._config.url, reason=reason)

    def _end_idle_threads(self, loop: asyncio.AbstractEventLoop) -> None:
        """Replace the event loop's thread pool, to end the idle thread in which aiomqtt connected."""
        former, self._threads = self._threads, ThreadPoolExecutor(thread_name_prefix="asyncio")
        loop.set_default_executor(self._threads)
        if former is not None:
            former.shutdown(wait=False)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise CloudUnreachable(
                f"{self._client_id}: the link to {self._config.url} has failed: {self._failure!r}"
            ) from self._failure


def new_client(config: LinkConfig, tls: ssl.SSLContext | None, will: tuple[str, bytes] | None = None) -> aiomqtt.Client:
    """Return a client for one connection, as a context manager; it raises MqttError if it cannot connect."""
    host, port, _ = parse_url(config.url)
    client = aiomqtt.Client(
        host,
        port,
        identifier=config.client_id,
        username=None if tls else config.client_id,
        keepalive=config.keepalive_s,
        timeout=ANSWER_S,
        will=aiomqtt.Will(*will, qos=1, retain=True) if will else None,
        tls_context=tls,
        max_inflight_messages=MAX_IN_FLIGHT,
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],  # no message waits for a TCP ACK
        logger=_paho_log,
    )
    client.pending_calls_threshold = MAX_IN_FLIGHT
    return client


async def _cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
