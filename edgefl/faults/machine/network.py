"""The network of a simulation: connections between nodes, with latency, and cuts that a fault makes.

A connection keeps the order of what it carries, as TCP does; different connections overtake each other. A cut link
carries nothing: for a short time its bytes only come late, after a longer one both ends learn that it is broken, each
at a time of its own. A node that is killed ends its connections at once; one whose power fails is only missed later.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from edgefl.faults.machine.kernel import Kernel, Node

CONNECT_S = 5.0  # a connection attempt over a cut link fails after it
SILENCE_S = 20.0  # both ends notice a cut that lasts longer, by their keep-alive
_SLOWEST_S = 0.08


class Wire:
    """One connection from a client's node to a server's."""

    def __init__(self, network: Network, client: Node, server: Node) -> None:
        self._network, self._ends = network, (client, server)
        self.is_open = True
        self._clear_s = [0.0, 0.0]  # when the last message towards the client, or the server, is there
        self._on_lost: tuple[list[Callable[[], None]], list[Callable[[], None]]] = ([], [])

    @property
    def ends(self) -> tuple[Node, Node]:
        """The client and the server."""
        return self._ends

    def to_server(self, call: Callable[[], object]) -> None:
        """Let something arrive in the server's event loop."""
        self._carry(1, call)

    def to_client(self, call: Callable[[], object]) -> None:
        """Let something arrive in the client's event loop."""
        self._carry(0, call)

    def when_lost(self, call: Callable[[], None], *, at_server: bool) -> Callable[[], None]:
        """Call when an end learns that the connection is lost; returns a function that undoes this."""
        calls = self._on_lost[at_server]
        calls.append(call)
        return lambda: calls.remove(call) if call in calls else None

    def reset(self, *, client_after_s: float = 0.0, server_after_s: float = 0.0) -> None:
        """Break the connection: what is under way is lost, and each end learns of it after its time."""
        if not self.is_open:
            return
        self.is_open = False
        self._network.forget(self)
        for at_server, after_s in ((False, client_after_s), (True, server_after_s)):
            self._network.kernel.call_at(self._network.kernel.now_s + after_s, lambda end=at_server: self._tell(end))  # type: ignore[misc]

    def _tell(self, at_server: bool) -> None:  # noqa: FBT001 - an index
        node, calls = self._ends[at_server], list(self._on_lost[at_server])
        self._on_lost[at_server].clear()
        for call in calls:
            self._network.kernel.call_in(node, call)

    def _carry(self, end: int, call: Callable[[], object]) -> None:
        network = self._network
        if not self.is_open:
            return
        node = self._ends[end]
        free_s = max(network.kernel.now_s, network.cut_until_s(*self._ends))
        self._clear_s[end] = max(self._clear_s[end], free_s + network.latency_s(*self._ends))
        network.kernel.call_at(self._clear_s[end], lambda: self._arrive(node, call))

    def _arrive(self, node: Node, call: Callable[[], object]) -> None:
        if self.is_open:
            self._network.num_messages += 1
            self._network.kernel.call_in(node, call)


class Network:
    """All connections, who listens, and which links are cut."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.random = random.Random(f"{kernel.seed}/network")
        self.num_messages = 0
        self.on_event: Callable[[str], None] = lambda _text: None
        self.on_reply: Callable[[str, str, str, Any, Any], None] = lambda *_: None  # server, client, method, key, state
        self._listening: dict[tuple[str, int], tuple[Node, Any]] = {}
        self._open: list[Wire] = []
        self._cuts: dict[frozenset[str], float] = {}

    def listen(self, kind: str, port: int, node: Node, server: Any) -> None:
        """Let a node accept connections of a kind at a port until it is killed."""
        self._listening[kind, port] = node, server
        node.on_kill.append(lambda: self._lose(kind, port, node))

    def _lose(self, kind: str, port: int, node: Node) -> None:
        if self._listening.get((kind, port), (None,))[0] is node:
            del self._listening[kind, port]

    def latency_s(self, one: Node, other: Node) -> float:
        """Draw a latency between two nodes; within one node there is none."""
        return 0.0 if one.name == other.name else self.random.random() ** 3 * _SLOWEST_S + 0.001

    def cut(self, one: str, other: str, until_s: float) -> None:
        """Let a link carry nothing until a time; connections that are silent for too long are lost."""
        link = frozenset({one, other})
        self._cuts[link] = max(until_s, self._cuts.get(link, 0.0))
        if until_s - self.kernel.now_s > SILENCE_S:
            for connection in self._between(link):
                connection.reset(client_after_s=self.random.uniform(0.5, 1) * SILENCE_S,
                                 server_after_s=self.random.uniform(0.5, 1) * SILENCE_S)  # fmt: skip

    def break_link(self, one: str, other: str) -> None:
        """Reset the connections of a link, which can be made again at once."""
        for connection in self._between(frozenset({one, other})):
            connection.reset(client_after_s=self.latency_s(*connection.ends),
                             server_after_s=self.latency_s(*connection.ends))  # fmt: skip

    def cut_until_s(self, one: Node, other: Node) -> float:
        """Return until when the link between two nodes is cut."""
        return self._cuts.get(frozenset({one.name, other.name}), 0.0)

    def end_of(self, node: Node, *, unnoticed: bool) -> None:
        """End the connections of a node that was killed; `unnoticed`, the other ends learn it late."""
        for connection in [one for one in self._open if node in one.ends]:
            after_s = self.random.uniform(0.5, 1) * SILENCE_S if unnoticed else self.random.random() * 0.05
            connection.reset(client_after_s=after_s, server_after_s=after_s)

    def connect(self, kind: str, client: Node, port: int, done: Callable[[Wire | None, Any], None]) -> None:
        """Try to connect; `done` is called in the client's event loop with the connection and the server, or None."""
        now_s, found = self.kernel.now_s, self._listening.get((kind, port))
        cut_s = 0.0 if found is None else self.cut_until_s(client, found[0]) - now_s
        if cut_s > CONNECT_S:
            self.kernel.call_at(now_s + CONNECT_S, lambda: self.kernel.call_in(client, lambda: done(None, None)))
            return
        after_s = max(0.0, cut_s) + (0.001 if found is None else self.latency_s(client, found[0]))
        self.kernel.call_at(now_s + after_s, lambda: self._connected(kind, client, port, done))

    def _connected(self, kind: str, client: Node, port: int, done: Callable[[Wire | None, Any], None]) -> None:
        found = self._listening.get((kind, port))
        if found is None or not client.is_alive or not found[0].is_alive:
            self.kernel.call_in(client, lambda: done(None, None))
            return
        connection = Wire(self, client, found[0])
        self._open.append(connection)
        self.kernel.call_in(client, lambda: done(connection, found[1]))

    def forget(self, connection: Wire) -> None:
        """Note that a connection is over."""
        if connection in self._open:
            self._open.remove(connection)

    def _between(self, link: frozenset[str]) -> list[Wire]:
        return [one for one in self._open if {end.name for end in one.ends} == link and len(link) == 2]
