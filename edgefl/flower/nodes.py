"""The nodes of a simulated federation, and how a node handles a message.

A node costs nothing until a message reaches it; its `context.state` is then kept from round to round.
Invariants: a client that fails changes nothing, not even its state, and its reply is an Error;
no client sees another's records, or a changed run config.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from edgefl.errors import ConfigError, TaskError
from edgefl.flower.apps.app import KIND, RunConfigValue
from edgefl.flower.internals import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, ErrorCode, error_reply, with_own_metadata
from edgefl.flower.records import copy_message, copy_records
from edgefl.task import UserCode
from edgefl.training.own_randomness import OwnRandomness

FIRST_NODE_ID = 1000  # 0 and 1 have a meaning in Flower


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message for a node, and the node's context. Do not change it: copy first."""

    message: Message
    context: Context


@dataclass(frozen=True, slots=True)
class NodeReply:
    """A node's reply, and its state afterwards; no state if it failed."""

    reply: Message
    node_id: int
    state: RecordDict | None


class Runner(Protocol):
    """Runs ClientApps, here or elsewhere."""

    def run(self, deliveries: Iterable[Delivery], within_s: float) -> Iterator[NodeReply]:
        """Yield answers as they come, of clients that need at most `within_s`; waiting for a turn does not count."""


class Nodes:
    """The nodes of a federation, with the state of each."""

    def __init__(
        self, run_id: int, count: int, run_config: Mapping[str, RunConfigValue],
        node_config: Mapping[str, RunConfigValue] | None = None,
    ) -> None:  # fmt: skip
        if count < 1:
            raise ConfigError(f"a federation needs 1 node or more, not {count}")
        self._run_id, self._count, self._run_config = run_id, count, run_config
        self._node_config = dict(node_config or {})  # of every node, in addition to its partition
        if taken := sorted(self._node_config.keys() & {PARTITION_ID_KEY, NUM_PARTITIONS_KEY}):
            raise ConfigError(f"{taken[0]} of a simulated node is its position, and cannot be set")
        self._states: dict[int, RecordDict] = {}

    def ids(self) -> Sequence[int]:
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._count)

    def context(self, node_id: int) -> Context:
        """Return a node's context; raises ConfigError if there is no such node."""
        if node_id not in self.ids():
            raise ConfigError(f"there is no node {node_id}; nodes are {self.ids()[0]} to {self.ids()[-1]}")
        return Context(
            run_id=self._run_id,
            node_id=node_id,
            node_config={
                **self._node_config,
                PARTITION_ID_KEY: node_id - FIRST_NODE_ID,
                NUM_PARTITIONS_KEY: self._count,
            },
            state=self._states.get(node_id, RecordDict()),
            run_config=dict(self._run_config),
        )

    def keep(self, answer: NodeReply) -> None:
        """Store a node's state after its answer."""
        if answer.state:
            self._states[answer.node_id] = answer.state
        elif answer.state is not None:
            self._states.pop(answer.node_id, None)


def node_name(node_id: int) -> str:
    """Return the name of a node in results: its partition, which does not change from run to run."""
    return f"partition-{node_id - FIRST_NODE_ID}"


class InProcess:
    """Runs one client at a time, in this process, with random states other than the ServerApp's. Thread-safe."""

    def __init__(
        self, app: str, client_app: ClientApp, clock: Callable[[], float], randomness: OwnRandomness | None = None
    ) -> None:
        self._app, self._client_app, self._clock = app, client_app, clock
        self._randomness = randomness or OwnRandomness()
        self._turn = threading.Lock()  # clients share these states, so they take turns

    def run(self, deliveries: Iterable[Delivery], within_s: float) -> Iterator[NodeReply]:
        """Yield answers in the order of the deliveries, without those of clients that took longer than `within_s`."""
        for delivery in deliveries:
            with self._turn:
                start_s = self._clock()
                with self._randomness.used():
                    answer = execute(self._app, self._client_app, _own(delivery))
                answer = replace(answer, reply=copy_message(answer.reply))  # the ClientApp may keep a reference to it
                late = self._clock() - start_s >= within_s
            if not late:
                yield answer


def execute(app: str, client_app: ClientApp, delivery: Delivery) -> NodeReply:
    """Let a ClientApp answer a message, which it may change; a failure becomes an error reply, as in Flower.

    The ClientApp may keep a reference to the reply: callers that do not serialise it must copy it.
    """
    request = with_own_metadata(delivery.message)
    try:
        return attempt(app, client_app, delivery)
    except TaskError as error:
        return failed(request, str(error))


def attempt(app: str, client_app: ClientApp, delivery: Delivery) -> NodeReply:
    """Let a ClientApp answer as `execute` does; its exceptions become TaskError."""
    message, context = delivery.message, delivery.context
    message_id, run_config = message.metadata.message_id, dict(context.run_config)
    request = with_own_metadata(message)
    with UserCode(app, f"the ClientApp's {message.metadata.message_type!r}", KIND):
        reply = client_app(message, context)
    if not isinstance(reply, Message):
        return failed(request, f"the ClientApp returned a {type(reply).__name__}, not a Message")
    if reply.metadata.reply_to_message_id != message_id:
        return failed(request, "the ClientApp returned a Message that is no reply to the one it got")
    if context.run_config != run_config:
        fault = "The `run_config` field of the `Context` object cannot be modified"
        return failed(request, fault, ErrorCode.UNKNOWN)
    return NodeReply(reply, request.metadata.dst_node_id, copy_records(context.state))


def _own(delivery: Delivery) -> Delivery:
    """Return a copy that a ClientApp may change, as if the message had been serialised."""
    context = delivery.context
    return Delivery(
        copy_message(delivery.message),
        Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=dict(context.node_config),
            state=copy_records(context.state),
            run_config=dict(context.run_config),
        ),
    )


def failed(request: Message, reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> NodeReply:
    """Return a failure as Flower reports it."""
    return NodeReply(error_reply(request, reason, code), request.metadata.dst_node_id, None)
