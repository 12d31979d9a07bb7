"""MQTT in a simulation: a broker, and the client under the real link (`edgefl.protocols.mqtt.MqttLink`).

The contract is that of MQTT 3.1.1 with clean sessions: wills, retained messages, QoS 1 towards the broker until it
acknowledges, and towards a subscriber as long as its connection lasts, at times twice. A broker forgets all with its
process.
"""

from __future__ import annotations

import asyncio
import types
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

from aiomqtt import MqttError

from edgefl.faults.machine.kernel import Node
from edgefl.faults.machine.network import Network, Wire
from edgefl.faults.machine.threads import kernel

TWICE = 0.05  # how often a message of QoS 1 arrives twice
_Message = tuple[str, bytes]


def matches(pattern: str, topic: str) -> bool:
    """Whether a subscription's pattern covers a topic."""
    wanted, has = pattern.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted, has = wanted[:-1], has[: len(wanted) - 1]
    return len(wanted) == len(has) and all(one in {"+", two} for one, two in zip(wanted, has, strict=True))


class SimBroker:
    """A broker in a node, in place of `cloud.broker.builtin.BuiltinBroker`."""

    program = "simulated"
    reason = ""

    def __init__(self, network: Network, port: int, is_known: Callable[..., bool], owner: str) -> None:
        self._is_known, self._owner = is_known, owner
        node = kernel().node
        if node is None:
            raise RuntimeError("a broker starts outside of a node")
        self._network, self.port, self._node = network, port, node
        self._sessions: dict[str, _MqttSession] = {}
        self._retained: dict[str, bytes] = {}
        self.url = f"mqtts://127.0.0.1:{port}"

    async def __aenter__(self) -> Self:
        self._network.listen("mqtt", self.port, self._node, self)
        return self

    async def __aexit__(self, *_: object) -> None:
        """A node never ends in order."""

    def drop(self, device: str) -> None:
        """End a device's connection."""
        if (session := self._sessions.get(device)) is not None:
            session.connection.reset()

    def refresh(self) -> None:
        """Certificates are not simulated here."""

    def admit(self, session: _MqttSession) -> None:
        """Take in a client that the fleet knows; a former connection of the same name is lost."""
        if session.name != self._owner and not self._is_known(session.name, None):
            session.will = None
            session.connection.reset(client_after_s=self._network.latency_s(*session.connection.ends))
            return
        if (former := self._sessions.get(session.name)) is not None:
            self.lose(former)
        self._sessions[session.name] = session

    def lose(self, session: _MqttSession) -> None:
        """End a session; its will is published, unless the client said goodbye."""
        if self._sessions.get(session.name) is session:
            del self._sessions[session.name]
        session.connection.reset(client_after_s=self._network.latency_s(*session.connection.ends))
        if session.will is not None:
            will, session.will = session.will, None
            self.publish(*will, retain=True)

    def subscribe(self, session: _MqttSession, patterns: Sequence[str]) -> None:
        """Send what is retained, and from now on what is published."""
        session.patterns += patterns
        for topic, payload in self._retained.items():
            if any(matches(one, topic) for one in patterns):
                session.send((topic, payload))

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Send a message to all who want it."""
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for session in list(self._sessions.values()):
            if any(matches(one, topic) for one in session.patterns):
                session.send((topic, payload))
                if self._network.random.random() < TWICE:
                    session.send((topic, payload))


class _MqttSession:
    """One client's connection, at the broker's side."""

    def __init__(self, broker: SimBroker, client: SimMqttClient, connection: Wire) -> None:
        self.name, self.will, self.connection = client.name, client.will, connection
        self._broker, self._client = broker, client
        self.patterns: list[str] = []
        connection.when_lost(lambda: broker.lose(self), at_server=True)

    def send(self, message: _Message) -> None:
        self.connection.to_client(lambda: self._client.take(message))

    def reply(self, done: asyncio.Future[None]) -> None:
        def take() -> None:
            if not done.done():
                done.set_result(None)

        self.connection.to_client(take)

    def subscribe(self, patterns: Sequence[str], done: asyncio.Future[None]) -> None:
        self.reply(done)
        self._broker.subscribe(self, patterns)

    def publish(self, topic: str, payload: bytes, done: asyncio.Future[None], *, retain: bool) -> None:
        self._broker.publish(topic, payload, retain=retain)
        self.reply(done)

    def leave(self) -> None:
        self.will = None
        self._broker.lose(self)


class SimMqttClient:
    """`aiomqtt.Client`, as far as the link uses it."""

    def __init__(self, network: Network, node: Node, name: str, port: int, will: tuple[str, bytes] | None) -> None:
        self._network, self._node, self.name, self._port, self.will = network, node, name, port, will
        self._connection: Wire | None = None
        self._session: _MqttSession | None = None
        self._messages: deque[_Message] = deque()
        self._news = asyncio.Event()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def connected(connection: Wire | None, broker: SimBroker | None) -> None:
            if connection is None or broker is None:
                self._lose("connection refused")
                return
            self._connection = connection
            connection.when_lost(lambda: self._lose("connection lost"), at_server=False)

            def admit() -> None:
                self._session = session = _MqttSession(broker, self, connection)
                broker.admit(session)
                session.reply(admitted)

            connection.to_server(admit)

        self._network.connect("mqtt", self._node, self._port, connected)
        await self._answered(admitted, 3.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        session, connection = self._session, self._connection
        if session is not None and connection is not None and connection.is_open and not self._lost.done():
            connection.to_server(session.leave)
        elif connection is not None:
            connection.reset(server_after_s=self._network.latency_s(*connection.ends))

    async def subscribe(self, topics: Sequence[tuple[str, int]]) -> list[Any]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session, patterns = self._session, [one for one, _ in topics]
        if session is not None and self._connection is not None:
            self._connection.to_server(lambda: session.subscribe(patterns, done))
        await self._answered(done, 3.0)
        return [types.SimpleNamespace(is_failure=False) for _ in topics]

    async def publish(self, topic: str, payload: bytes, qos: int, retain: bool, timeout: float = 0) -> None:  # noqa: ARG002, ASYNC109, FBT001 - aiomqtt's
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session = self._session
        if session is not None and self._connection is not None:
            self._connection.to_server(lambda: session.publish(topic, payload, done, retain=retain))
        if qos:
            await self._answered(done, None)

    @property
    async def messages(self) -> AsyncIterator[Any]:
        while True:
            while self._messages:
                topic, payload = self._messages.popleft()
                yield types.SimpleNamespace(topic=types.SimpleNamespace(value=topic), payload=payload)
            if self._lost.done():
                raise MqttError("connection lost")
            self._news.clear()
            await self._news.wait()

    def take(self, message: _Message) -> None:
        self._messages.append(message)
        self._news.set()

    def _lose(self, _why: str) -> None:
        if not self._lost.done():
            self._lost.set_result(None)
        self._news.set()

    async def _answered(self, done: asyncio.Future[None], timeout_s: float | None) -> None:
        await asyncio.wait({done, self._lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise MqttError("the broker did not answer")


def client_factory(network: Callable[[], Network]) -> Callable[..., SimMqttClient]:
    """Return what makes clients, in place of `edgefl.protocols.mqtt.new_client`."""

    def new_client(config: Any, _tls: object, will: tuple[str, bytes] | None = None) -> SimMqttClient:
        node = kernel().node
        if node is None:
            raise RuntimeError("a client starts outside of a node")
        return SimMqttClient(network(), node, config.client_id, int(config.url.rpartition(":")[2]), will)

    return new_client
