"""One reconnecting MQTT link, the same for an agent and for the cloud: a thin shell around paho-mqtt.

Why not paho's own thread: it waits by select(), which breaks at file descriptor 1024, and a cloud with
a thousand devices has more; and an error in a handler would end it unheard. So a thread of ours runs
paho's documented external loop. Every connection is a clean MQTT 3.1.1 session: a lost message costs
latency only, since on each connect the owner asks over gRPC what is next.

Invariants: handlers run in the link's one thread and must return soon (they hold up its reading);
`publish` never waits; on_connect comes after the subscriptions are in force, on every connect.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from edgefl.errors import CloudUnreachable, MissingExtra, ProtocolError
from edgefl.logs import event
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.link_config import LinkConfig, Will, parse_url
from edgefl.protocols.messages import MAX_MESSAGE_BYTES
from edgefl.protocols.tls import client_context

try:
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion, LogLevel, MQTTErrorCode
except ImportError as cause:
    raise MissingExtra("the MQTT link", "agent") from cause

__all__ = ["LinkConfig", "MqttLink", "Will", "parse_url"]

MAX_QUEUED = 10_000  # messages that wait for the broker's acknowledgement
MAX_IN_FLIGHT = 200
FIRST_DELAY_S, LAST_DELAY_S = 0.2, 2.0  # between attempts to connect; doubles
MAX_FAULTS, FAULTS_S = 5, 60.0  # errors of our own that a link survives: fewer than so many within such a time
DIAL_TIMEOUT_S = 3.0
TICK_S = 1.0  # how often keep-alive is looked at
GOODBYE_S = 1.0  # to write the DISCONNECT
SERVER_UNAVAILABLE = 0x88  # paho's number for a CONNACK's 3: there is no place

_log = logging.getLogger(__name__)


def _nothing(*_: object) -> None:
    pass


class _ClosingSocket(ssl.SSLSocket):
    """Closes itself where its handshake fails; paho would leave it open."""

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002  # as in SSLSocket
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


class MqttLink:
    """A connection that comes back. All handlers run in the link's thread, none may call `close`.

    An error of `on_message` costs that message only: a ProtocolError is logged with its topic, any other,
    which is a defect of ours, with its traceback. After an error anywhere else the link connects again; at
    the MAX_FAULTS-th within FAULTS_S it ends, `on_failure` hears of it, and `publish` and `wait_connected`
    raise it from then on.
    """

    def __init__(
        self,
        config: LinkConfig,
        *,
        on_failure: Callable[[BaseException], None],
        on_message: Callable[[str, bytes], None] = _nothing,
        on_connect: Callable[[], None] = _nothing,
        on_disconnect: Callable[[], None] = _nothing,
    ) -> None:
        self._config = config
        self._on_message, self._on_connect = on_message, on_connect
        self._on_disconnect, self._on_failure = on_disconnect, on_failure
        self._changed = threading.Condition()
        self._up = False
        self._failure: BaseException | None = None
        self._fault = ""  # what paho said last about this connection
        self._reason = ""  # why the link is down
        self._closing = threading.Event()
        self._backoff = Backoff(config.client_id, FIRST_DELAY_S, LAST_DELAY_S)
        self._no_place = False  # the broker said so
        self._faults_s: deque[float] = deque(maxlen=MAX_FAULTS)
        self._sent: deque[paho.MQTTMessageInfo] = deque()
        self._sent_lock = threading.Lock()
        self._wake_lock = threading.Lock()  # a leaf: nothing of paho is called under it
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.settimeout(0)
        self._wake_out.settimeout(0)
        self._leave_for = ""  # why the connection is to be made anew
        self._context: ssl.SSLContext | None = None
        self._client = self._make_client()
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{config.client_id}", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Whether the subscriptions are in force, now or within the time."""
        with self._changed:
            self._changed.wait_for(lambda: self._up or self._failure, timeout_s)
            self._raise_failure()
            return self._up

    @property
    def reason(self) -> str:
        """Why the link is down, for a person to read; empty while it is up."""
        return "" if self._up else self._reason or "it has not connected yet"

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Queue a message; QoS 1 survives a lost connection, QoS 0 is dropped where there is none.

        Raises ProtocolError if it is too large, CloudUnreachable if the queue is full or the link closed.
        """
        self._raise_failure()
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"message on {topic} has {len(payload)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
        if self._closing.is_set():
            raise CloudUnreachable(f"{self._config.client_id}: the link to {self._config.url} is closed")
        info = self._client.publish(topic, payload, qos, retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise CloudUnreachable(
                f"{self._config.client_id}: {MAX_QUEUED} messages wait for broker {self._config.url} ({self.reason}); "
                f"the one on {topic} was not taken"
            )
        if qos:
            info.rc = MQTTErrorCode.MQTT_ERR_SUCCESS  # paho says "no connection" of a message that it keeps
            self._remember(info)
        elif info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            event(_log, logging.DEBUG, "mqtt.dropped", topic=topic, reason=self.reason)
        self._wake()

    def reconnect(self, reason: str) -> None:
        """Leave the broker without a will and come back at once; what is queued is sent then."""
        self._leave_for = reason
        self._wake()

    def close(self, flush_s: float = 2.0) -> None:
        """Give what is queued `flush_s` to be acknowledged, say goodbye (no will), end the thread."""
        if self._thread.is_alive() and not self._closing.is_set():
            until_s = time.monotonic() + flush_s
            for info in self._unacknowledged() if self._up else ():
                info.wait_for_publish(max(0.0, until_s - time.monotonic()))
            self._closing.set()
            self._wake()
            self._thread.join(2 * DIAL_TIMEOUT_S + GOODBYE_S)
        self._closing.set()
        if not self._thread.is_alive():  # it may hang in a name server; it is a daemon, and ends there
            with self._wake_lock:
                self._wake_in.close()
                self._wake_out.close()

    # Below: the link's own thread.

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._connect_once()
                self._closing.wait(self._backoff.next_s(full=self._no_place))
        except BaseException as failure:
            with self._changed:
                self._failure, self._up = failure, False
                self._changed.notify_all()
            self._on_failure(failure)
            raise
        finally:
            self._hang_up()

    def _connect_once(self) -> None:
        """Connect and converse; an error in it is survived, unless there were too many of late."""
        try:
            if self._dial():
                self._converse()
        except Exception as fault:
            now_s = time.monotonic()
            self._faults_s.append(now_s)
            if len(self._faults_s) == MAX_FAULTS and now_s - self._faults_s[0] < FAULTS_S:
                raise
            _log.exception("mqtt.fault client=%s: it connects again", self._config.client_id)
            was_up = self._up
            self._hang_up()
            self._note_down(f"a fault of this program: {fault!r}")
            if was_up:
                self._on_disconnect()

    def _dial(self) -> bool:
        self._fault = self._leave_for = ""
        self._no_place = False
        if self._config.will:
            self._client.will_set(*self._config.will(), qos=1, retain=True)
        try:
            if self._context is not None and self._config.identity is not None:  # it may have been renewed
                self._context.load_cert_chain(self._config.identity.cert, self._config.identity.key)
            self._client.reconnect()
        except OSError as cause:
            self._note_down(str(cause))
            return False
        return True

    def _converse(self) -> None:
        """Read and write until the connection ends, or until the goodbye is written."""
        connection: Any = self._client.socket()
        goodbye_by_s: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_in, selectors.EVENT_READ)
            selector.register(connection, selectors.EVENT_READ)
            while self._client.socket() is connection:
                if goodbye_by_s is None and self._leave_for:
                    self._fault, self._leave_for = self._leave_for, ""
                    goodbye_by_s = time.monotonic() + GOODBYE_S
                    self._client.disconnect()
                if goodbye_by_s is None and self._closing.is_set():
                    goodbye_by_s = time.monotonic() + GOODBYE_S
                    self._client.disconnect()
                if goodbye_by_s is not None and time.monotonic() > goodbye_by_s:
                    return
                self._turn(selector, connection)

    def _turn(self, selector: selectors.BaseSelector, connection: Any) -> None:
        writing = selectors.EVENT_WRITE if self._client.want_write() else 0
        selector.modify(connection, selectors.EVENT_READ | writing)
        decrypted = isinstance(connection, ssl.SSLSocket) and connection.pending() > 0
        ready = {key.fileobj for key, _ in selector.select(0.0 if decrypted else TICK_S)}
        if self._wake_in in ready:
            self._wake_in.recv(4096)
        if decrypted or connection in ready:
            self._client.loop_read()
        if self._client.want_write():
            self._client.loop_write()
        self._client.loop_misc()

    def _hang_up(self) -> None:
        connection = self._client.socket()
        if connection is not None:
            connection.close()
        with self._changed:
            self._up = False
            self._changed.notify_all()

    # Below: paho's callbacks, in the same thread.

    def _make_client(self) -> paho.Client:
        config = self._config
        host, port, secure = parse_url(config.url)
        client = paho.Client(CallbackAPIVersion.VERSION2, config.client_id, clean_session=True)
        if secure and config.identity is not None:
            self._context = client_context(config.identity.ca, config.identity)
            self._context.sslsocket_class = _ClosingSocket
            client.tls_set_context(self._context)
        else:
            client.username_pw_set(config.client_id)
        client.max_queued_messages_set(MAX_QUEUED)
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.connect_timeout = DIAL_TIMEOUT_S
        client.on_connect, client.on_disconnect = self._connected, self._disconnected
        client.on_subscribe, client.on_message = self._subscribed, self._received
        client.on_log, client.on_socket_open = self._note_log, self._tune
        client.on_socket_register_write = lambda *_: self._wake()  # also keeps paho from writing in the caller's thread
        client.connect_async(host, port, config.keepalive_s)
        return client

    def _connected(self, _client: object, _data: object, _flags: object, code: Any, _properties: object) -> None:
        if code.is_failure:
            self._fault = f"the broker refused {self._config.client_id!r}: {code}"
            self._no_place = code.value == SERVER_UNAVAILABLE
        elif self._config.subscriptions:
            self._client.subscribe(list(self._config.subscriptions))
        else:
            self._come_up()

    def _subscribed(self, _client: object, _data: object, _mid: int, codes: list[Any], _properties: object) -> None:
        refused = [
            topic for (topic, _), code in zip(self._config.subscriptions, codes, strict=False) if code.is_failure
        ]
        if refused:
            self._fault = f"the broker does not let {self._config.client_id!r} subscribe to {', '.join(refused)}"
            self._client.disconnect()
        else:
            self._come_up()

    def _come_up(self) -> None:
        self._backoff.reset()
        self._reason = ""
        event(_log, logging.INFO, "mqtt.up", client=self._config.client_id, broker=self._config.url)
        self._on_connect()
        with self._changed:
            self._up = True
            self._changed.notify_all()

    def _disconnected(self, _client: object, _data: object, _flags: object, code: Any, _properties: object) -> None:
        was_up = self._up
        with self._changed:
            self._up = False
            self._changed.notify_all()
        if not self._closing.is_set():
            self._note_down(self._fault or ("the broker closed the connection" if code.is_failure else str(code)))
        if was_up:
            self._on_disconnect()

    def _received(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
            self._on_message(topic, bytes(message.payload))
        except UnicodeDecodeError:
            event(_log, logging.WARNING, "mqtt.bad_message", reason="its topic is not UTF-8")
        except ProtocolError as fault:
            event(_log, logging.WARNING, "mqtt.bad_message", topic=topic, reason=fault)
        except Exception:  # noqa: BLE001 - whatever a peer's message finds out about us costs that message only
            _log.critical("mqtt.message_lost topic=%r bytes=%d", topic, len(message.payload), exc_info=True)

    def _note_down(self, reason: str) -> None:
        """Log why the link is down, each reason once; `_reason` is empty while it is up."""
        level = logging.DEBUG if reason == self._reason else logging.WARNING
        self._reason = reason
        event(_log, level, "mqtt.down", client=self._config.client_id, broker=self._config.url, reason=reason)

    def _note_log(self, _client: object, _data: object, level: int, text: str) -> None:
        if level == LogLevel.MQTT_LOG_ERR:
            self._fault = text

    @staticmethod
    def _tune(_client: object, _data: object, connection: Any) -> None:
        # Without it a small message waits for the acknowledgement of the one before it.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # Below: any thread.

    def _remember(self, info: paho.MQTTMessageInfo) -> None:
        with self._sent_lock:
            while self._sent and self._sent[0].is_published():
                self._sent.popleft()
            if len(self._sent) >= 2 * MAX_QUEUED:  # one lost acknowledgement at the head must not hold all others
                self._sent = deque(one for one in self._sent if not one.is_published())
            self._sent.append(info)

    def _unacknowledged(self) -> list[paho.MQTTMessageInfo]:
        with self._sent_lock:
            return [info for info in self._sent if not info.is_published()]

    def _wake(self) -> None:
        with self._wake_lock:
            if self._wake_out.fileno() >= 0:
                with contextlib.suppress(BlockingIOError):  # it has been woken more often than it could look
                    self._wake_out.send(b"\0")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise CloudUnreachable(
                f"{self._config.client_id}: a handler of the link to {self._config.url} failed: {self._failure!r}"
            ) from self._failure
