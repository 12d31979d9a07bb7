"""Sessions, subscriptions and retained messages of the built-in broker, without I/O.

A session has a client's subscriptions and pending messages. It ends with the connection, or is kept if the client
asked for that; then new messages are queued, and unacknowledged ones are sent again after the next connect.
Invariants: a session's queue and its unacknowledged packets are bounded; a client gets a message once, however many
of its filters match; a client that does not read its messages delays only itself.
MQTT 3.1.1, sections 3.3, 3.8, 4.3 (QoS), 4.4 (redelivery) and 4.7 (topics).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cloud.broker.packets import DUP, PUBLISH, PUBREC, PUBREL, MqttMessage, acknowledgement, publish

MAX_IN_FLIGHT = 200  # unacknowledged packets of QoS 1 and 2 per client
MAX_QUEUED = 100_000  # messages behind them: one retained state per device of a large fleet


class Session:
    """The subscriptions and pending messages of one client."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.filters: set[str] = set()
        self.received: set[int] = set()  # packet ids of QoS 2 that the client has not released
        self._write: Callable[[bytes], None] | None = None  # None: not connected, or its send buffer is full
        self._unacknowledged: dict[int, bytes] = {}
        self._queue: deque[tuple[MqttMessage, int, bool]] = deque()
        self._number = 0

    def deliver(self, message: MqttMessage, qos: int, *, retain: bool = False) -> None:
        """Send a message or queue it; QoS 0 is never queued, and a message for a full queue is dropped."""
        if not qos:
            if self._write is not None:
                self._write(publish(message, 0, 0, retain=retain))
        elif len(self._queue) < MAX_QUEUED:
            self._queue.append((message, qos, retain))
            self._fill()

    def acknowledge(self, kind: int, number: int) -> None:
        """Handle the client's PUBACK, PUBREC or PUBCOMP."""
        if number not in self._unacknowledged:
            return
        if kind == PUBREC:
            self._unacknowledged[number] = acknowledgement(PUBREL, number)
            if self._write is not None:
                self._write(self._unacknowledged[number])
        else:
            del self._unacknowledged[number]
            self._fill()

    def resume(self, write: Callable[[bytes], None], *, again: bool) -> None:
        """Send queued messages by `write`; on a new connection (`again`), unacknowledged packets first."""
        self._write = write
        for packet in self._unacknowledged.values() if again else ():
            write(bytes([packet[0] | DUP]) + packet[1:] if packet[0] >> 4 == PUBLISH else packet)
        self._fill()

    def pause(self) -> None:
        """Queue everything until `resume`."""
        self._write = None

    def _fill(self) -> None:
        while self._queue and self._write is not None and len(self._unacknowledged) < MAX_IN_FLIGHT:
            message, qos, retain = self._queue.popleft()
            self._number = self._number % 0xFFFF + 1
            while self._number in self._unacknowledged:
                self._number = self._number % 0xFFFF + 1
            self._unacknowledged[self._number] = publish(message, qos, self._number, retain=retain)
            self._write(self._unacknowledged[self._number])


class _Node:
    """A level in the tree of filters."""

    __slots__ = ("below", "subscribers")

    def __init__(self) -> None:
        self.below: dict[str, _Node] = {}
        self.subscribers: dict[Session, int] = {}  # with the requested QoS


class Sessions:
    """All sessions of a broker, and the retained messages. Used in one event loop only."""

    def __init__(self) -> None:
        self._by_name: dict[str, Session] = {}
        self._retained: dict[str, MqttMessage] = {}
        self._root = _Node()

    def open(self, name: str, *, clean: bool) -> tuple[Session, bool]:
        """Return a client's session, and whether it existed before."""
        if clean:
            self.forget(name)
        was_here = name in self._by_name
        return self._by_name.setdefault(name, Session(name)), was_here

    def forget(self, name: str) -> None:
        """Delete a session, if there is one."""
        if (session := self._by_name.pop(name, None)) is not None:
            for filter_ in tuple(session.filters):
                self.unsubscribe(session, filter_)

    def publish(self, message: MqttMessage) -> None:
        """Deliver a message to its subscribers, and store it if it is a retained message."""
        if message.retain and message.payload:
            self._retained[message.topic] = message
        elif message.retain:
            self._retained.pop(message.topic, None)
        for session, qos in self._subscribers(message.topic).items():
            session.deliver(message, min(qos, message.qos))

    def subscribe(self, session: Session, filter_: str, qos: int) -> None:
        """Add a filter to a session, and deliver the matching retained messages."""
        node = self._root
        for level in filter_.split("/"):
            node = node.below.setdefault(level, _Node())
        node.subscribers[session] = qos
        session.filters.add(filter_)
        for topic in [filter_] if filter_ in self._retained else self._retained_under(filter_):
            message = self._retained[topic]
            session.deliver(message, min(qos, message.qos), retain=True)

    def unsubscribe(self, session: Session, filter_: str) -> None:
        """Remove a filter from a session."""
        if filter_ not in session.filters:
            return
        session.filters.remove(filter_)
        levels, path = filter_.split("/"), [self._root]
        for level in levels:
            path.append(path[-1].below[level])
        del path[-1].subscribers[session]
        for level, parent, node in zip(reversed(levels), path[-2::-1], path[:0:-1], strict=True):
            if not node.subscribers and not node.below:
                del parent.below[level]

    def _retained_under(self, filter_: str) -> list[str]:
        start = filter_.partition("+")[0].partition("#")[0]
        if start == filter_:
            return []  # no wildcard, and no retained message
        return [topic for topic in self._retained if topic.startswith(start.rstrip("/")) and matches(filter_, topic)]

    def _subscribers(self, topic: str) -> dict[Session, int]:
        found: dict[Session, int] = {}
        for node in self._nodes(topic):
            for session, qos in node.subscribers.items():
                found[session] = max(qos, found.get(session, 0))
        return found

    def _nodes(self, topic: str) -> list[_Node]:
        """Return the nodes of all filters that match a topic."""
        found, nodes = [], [self._root]
        for depth, level in enumerate(topic.split("/")):
            wild = depth > 0 or not topic.startswith("$")
            if wild:
                found += [node.below["#"] for node in nodes if "#" in node.below]
            keys = (level, "+") if wild else (level,)
            nodes = [node.below[key] for node in nodes for key in keys if key in node.below]
        return found + nodes + [node.below["#"] for node in nodes if "#" in node.below]


def matches(filter_: str, topic: str) -> bool:
    """Whether a filter matches a topic; a leading wildcard does not match `$...`."""
    pattern, levels = filter_.split("/"), topic.split("/")
    if topic.startswith("$") and pattern[0] in {"+", "#"}:
        return False
    if pattern[-1] == "#":
        pattern.pop()
        levels = levels[: len(pattern)]
    return len(pattern) == len(levels) and all(one in {"+", level} for one, level in zip(pattern, levels, strict=True))
