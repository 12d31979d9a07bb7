"""The embedded broker: MQTT 3.1.1 inside the cloud's process, in a thread and an event loop of its own.

For small fleets and the first run; a large fleet has a mosquitto (see `cloud.broker.mosquitto_config`). Both give
the same rights: TLS 1.3 with a certificate of the fleet, a device on its own topics only. Retained
messages live in memory: after a restart each device says again what it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, Self

from cloud.shares import PortShare
from edgefl.errors import ConfigError, PartFailed
from edgefl.protocols.addresses import bracketed, is_loopback
from edgefl.protocols.ports.connections import Connection, Connections
from edgefl.protocols.ports.listener import Listener, Port, listen
from edgefl.protocols.tls import Identity, reloading, server_context

if TYPE_CHECKING:
    from cloud.broker.gate import Gate

START_S = 10.0
STOP_S = 5.0
MAX_FAULTS, FAULTS_S = 5, 60.0  # of its parts, that a broker survives: fewer than so many within such a time
AGAIN_S = 0.5
ROOMY = PortShare(seats=10_000, waiting=256)

_log = logging.getLogger(__name__)


def _everyone(_name: str, _serial: str | None) -> bool:
    return True


class EmbeddedBroker:
    """A broker that starts and stops with its owner.

    `identity` None is the insecure mode, for the loopback only: a client is who its user name says.
    `is_known` says whether a device is still enrolled with a certificate of this serial number (None in
    the insecure mode); it is asked in the broker's thread at each connect and must answer soon. Port 0
    takes a free one; `port` and `url` tell which. A broker whose part ends starts again, on the same port;
    at the MAX_FAULTS-th time within FAULTS_S `on_failure` hears of it, or without it threading's hook.
    """

    def __init__(
        self, identity: Identity | None, host: str, port: int,
        *, is_known: Callable[[str, str | None], bool] = _everyone, share: PortShare = ROOMY,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:  # fmt: skip
        if identity is None and not is_loopback(host):
            raise ConfigError(f"a broker without TLS listens on the loopback only, not on {host!r}; leave --insecure")
        self._identity = identity
        self._host = host
        self.port = port
        self._is_known = is_known
        self._share = share
        self._on_failure = on_failure
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._gate: Gate | None = None
        self._reload: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where clients on this machine find it."""
        return f"{'mqtts' if self._identity else 'mqtt'}://{bracketed(self._host)}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Return when it listens; raises ConfigError for a port that is in use, MissingExtra without amqtt."""
        started: Future[int] = Future()
        self._ending.clear()
        self._thread = threading.Thread(target=self._run, args=(started,), name="broker", daemon=True)
        self._thread.start()
        self.port = started.result(START_S)

    def stop(self) -> None:
        """End all connections and the thread; does nothing if it does not run."""
        if self._thread is None or self._loop is None or self._stopping is None:
            return
        self._ending.set()
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # between two loops: it looks at `_ending`
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(3 * STOP_S)
        self._thread = None

    def drop(self, device: str) -> None:
        """End a device's connection, and wait until it has ended; with `is_known` saying no it stays out."""
        if self._loop is None or self._gate is None or self._thread is None or not self._thread.is_alive():
            return
        with contextlib.suppress(FutureTimeout):  # it is aborted; only its last will is late
            asyncio.run_coroutine_threadsafe(self._gate.drop(device), self._loop).result(STOP_S)

    def reload(self) -> None:
        """Show the certificate that is in its file now, from the next handshake on."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._reload)

    def _run(self, started: Future[int]) -> None:
        faults_s: deque[float] = deque(maxlen=MAX_FAULTS)
        while not self._ending.is_set():
            try:
                asyncio.run(self._serve(started))
            except BaseException as fault:
                if not started.done():
                    started.set_exception(fault)
                    return
                faults_s.append(time.monotonic())
                if len(faults_s) == MAX_FAULTS and faults_s[-1] - faults_s[0] < FAULTS_S:
                    if self._on_failure is None:
                        raise
                    self._on_failure(fault)
                    return
                _log.exception("broker.fault port=%d: it starts again", self.port)
                self._ending.wait(AGAIN_S)

    async def _serve(self, started: Future[int]) -> None:
        from cloud.broker.gate import Gate  # and with it amqtt, only where a broker is wanted

        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._gate = gate = Gate(
            secure=self._identity is not None, is_known=self._is_known, max_devices=self._share.seats
        )
        await gate.start()
        try:
            listener = self._listen(gate)
        except ConfigError:
            await gate.close(STOP_S)
            raise
        if not started.done():
            started.set_result(listener.port_number)
        try:
            await self._until_stopped({gate.broadcasting, *listener.tasks})
        finally:
            listener.close()
            await gate.close(STOP_S)
            await listener.wait_closed()

    async def _until_stopped(self, parts: set[asyncio.Future[Any]]) -> None:
        """Wait for `stop`; raises PartFailed where one of the parts ends before."""
        if self._stopping is None:
            return
        stopping = asyncio.create_task(self._stopping.wait(), name="broker-stop")
        try:
            done, _ = await asyncio.wait({stopping, *parts}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if stopping not in done:
            [ended, *_] = done
            fault = None if ended.cancelled() else ended.exception()
            raise PartFailed(f"a part of the embedded broker has ended: {fault!r}") from fault

    def _listen(self, gate: Gate) -> Listener:
        context = None
        if self._identity is not None:
            context = server_context(self._identity, client_certificates=True)
            self._reload = reloading(context, self._identity)
        listening = listen(self._host, self.port, "--mqtt-port")
        port = Port(name="mqtt", socket=listening, context=(lambda: context) if context else None)
        connections = Connections(self._share.limits(), asyncio.get_running_loop().time)
        listener = Listener(port, connections, lambda place: _Conversation(gate, place))
        listener.start()
        return listener


class _Conversation(asyncio.StreamReaderProtocol):
    """One connection's bytes as streams, from the end of the TLS handshake until it is lost."""

    def __init__(self, gate: Gate, place: Connection) -> None:
        super().__init__(asyncio.StreamReader(), functools.partial(gate.accept, place))
        self._place = place

    def connection_lost(self, exc: Exception | None) -> None:
        self._place.leave()
        super().connection_lost(exc)
