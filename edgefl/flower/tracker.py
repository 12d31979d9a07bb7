"""Derive a run's rounds from its messages, whatever strategy the ServerApp uses.

The round of a message is its config's `server-round`, else its group id (the legacy server's), else
counted: each train batch opens the next. Queries do not open a round.
Invariant: the tracker only observes. An error in it, or in a callback for rounds, is logged and changes nothing.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message, MetricRecord

from edgefl.flower.apps.error_boundary import BestEffort
from edgefl.flower.nodes import node_name
from edgefl.flower.records import message_bytes
from edgefl.records import RoundReport

WEIGHT = "num-examples"  # Flower's default weighted_by_key
_LEGACY = ("fitres.", "evaluateres.")  # records of the legacy server; its History has more metrics


@dataclass(slots=True)
class TrackedRound:
    """One round, as seen from its messages."""

    number: int
    start_s: float
    end_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    asked: dict[str, dict[str, str]] = field(default_factory=dict)  # category -> node -> id of its last message
    done: dict[str, set[str]] = field(default_factory=dict)  # category -> nodes that answered their last message
    failed: dict[str, str] = field(default_factory=dict)  # node -> reason
    _sums: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)  # (weighted sum, weight)

    @property
    def num_admitted(self) -> int:
        """How many clients took part."""
        return len(self.participants)

    @property
    def participants(self) -> set[str]:
        """Clients that answered with content; in a round with training, to their last training message.

        Secure aggregation sends several in a round: a client that leaves between two of them has not taken part.
        """
        return self.done.get("train", set()) if "train" in self.asked else set().union(*self.done.values())

    @property
    def missing(self) -> set[str]:
        """Clients that did not take part because their last message, of any category, has no reply."""
        silent = (nodes.keys() - self.done.get(category, set()) for category, nodes in self.asked.items())
        return set().union(*silent) - self.failed.keys() - self.participants

    def ask(self, category: str, node: str, message_id: str) -> None:
        """Record a message to a node; from now on, only the answer to this one counts."""
        self.asked.setdefault(category, {})[node] = message_id
        self.done.get(category, set()).discard(node)

    def answer(self, category: str, node: str, message_id: str) -> None:
        """Record an answer with content."""
        if self.asked.get(category, {}).get(node) == message_id:
            self.done.setdefault(category, set()).add(node)

    def count(self, category: str, metrics: Mapping[str, MetricRecord]) -> None:
        """Fold a reply's metrics into the weighted means of its category."""
        sums = self._sums.setdefault(category, {})
        for name, record in metrics.items():
            if name.startswith(_LEGACY):
                continue
            weight = record.get(WEIGHT, 1)
            for key, value in record.items():
                if key != WEIGHT and not isinstance(value, list) and not isinstance(weight, list):
                    total, weights = sums.get(key, (0.0, 0.0))
                    sums[key] = (total + weight * value, weights + weight)

    def metrics(self, category: str) -> dict[str, float]:
        """Return the weighted means of a category's replies."""
        return {key: total / weight for key, (total, weight) in self._sums.get(category, {}).items() if weight}

    def report(self, metrics: Mapping[str, float] | None = None) -> RoundReport:
        """Return the public report of the round, with a strategy's own `metrics`."""
        seen = merged(self.metrics("evaluate"), {}, self.metrics("train"))
        return RoundReport(
            round=self.number,
            admitted=self.num_admitted,
            rejected=0,
            failed=len(self.failed),
            missing=len(self.missing),
            reasons=dict(self.failed),
            seconds=self.end_s - self.start_s,
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
            metrics=seen if metrics is None else {**seen, **metrics},
        )


class RoundTracker:
    """Derives rounds from every message and reply of a run. Thread-safe."""

    def __init__(
        self, clock: Callable[[], float], on_round: Callable[[RoundReport], None] | None = None,
        name: Callable[[int], str] = node_name,
    ) -> None:  # fmt: skip
        self.clock = clock
        self._on_round, self._name = on_round, name
        self._rounds: dict[int, TrackedRound] = {}
        self._open = 0  # the round that is open; 0 = none
        self._round_of: dict[str, int] = {}  # by message id; only messages without a reply yet
        self._asked: Counter[str] = Counter()  # messages of the whole run, by category
        self._answered: Counter[str] = Counter()  # messages whose reply has content
        self._reasons: list[str] = []  # why other replies have none, in rounds
        self._early: list[str] = []  # the same, outside of rounds
        self._lock = threading.Lock()
        self._recording = BestEffort("the records of the rounds")
        self._reporting = BestEffort("the display of the rounds")

    @property
    def rounds(self) -> Sequence[TrackedRound]:
        return list(self._rounds.values())

    def unanswered(self) -> str | None:
        """Return the category of messages without any answer: `train` if the run trained, else any in rounds."""
        if self._asked["train"]:
            return None if self._answered["train"] else "train"
        return "evaluate" if self._reasons and not any(one.num_admitted for one in self._rounds.values()) else None

    def num_asked(self, category: str) -> int:
        """Return how many messages of a category were sent."""
        return self._asked[category]

    def failures(self) -> Sequence[str]:
        """Return the reasons of all failures in rounds, with the nodes' names."""
        return list(self._reasons)

    def all_failures(self) -> Sequence[str]:
        """Return the reasons of all failures; those outside of rounds come first."""
        return [*self._early, *self._reasons]

    def opens_round(self, message: Message) -> bool:
        """Whether a message belongs to another round than the open one."""
        with self._lock:
            return self._number(message) != self._open

    def sent(self, messages: Sequence[Message]) -> None:
        """Record messages that were pushed together."""
        with self._lock, self._recording:
            self._asked.update(map(_category, messages))
            if messages:
                self._enter(self._number(messages[0]))
            seen = self._rounds.get(self._open)
            for message in messages:
                metadata = message.metadata
                if metadata.message_id:
                    self._round_of[metadata.message_id] = self._open
                if seen is not None:
                    seen.ask(_category(message), self._name(metadata.dst_node_id), metadata.message_id)
            if seen is not None:  # last, as it may fail
                seen.down_bytes += sum(map(message_bytes, messages))

    def answered(self, request: Message, reply: Message) -> None:
        """Record a reply, in the round of its request."""
        with self._lock, self._recording:
            node, category = self._name(request.metadata.dst_node_id), _category(request)
            reason = (reply.error.reason or f"error {reply.error.code}") if reply.has_error() else None
            self._answered[category] += reason is None
            number = self._round_of.pop(request.metadata.message_id, self._open)
            if (seen := self._rounds.get(number)) is None:
                self._early += [] if reason is None else [f"{node}: {reason}"]
                return
            seen.end_s = self.clock() if number == self._open else seen.end_s
            if reason is not None:
                self._reasons.append(f"{node}: {reason}")
                seen.failed.setdefault(node, reason)
                return
            seen.answer(category, node, request.metadata.message_id)
            seen.up_bytes += message_bytes(reply)
            seen.count(category, reply.content.metric_records)

    def finish(self) -> None:
        """Record the end of the run."""
        with self._lock, self._recording:
            self._enter(0)

    def _enter(self, number: int) -> None:
        """Close the open round if another begins."""
        if number == self._open:
            return
        ended, self._open = self._rounds.get(self._open), number
        if number:
            self._rounds.setdefault(number, TrackedRound(number, self.clock()))
        if ended is not None:
            ended.end_s = self.clock()
            if self._on_round is not None:
                with self._reporting:
                    self._on_round(ended.report())

    def _number(self, message: Message) -> int:
        category = _category(message)
        if category not in {"train", "evaluate"}:
            return self._open
        for config in message.content.config_records.values():
            number = config.get("server-round")
            if isinstance(number, int) and number > 0:
                return number
        if message.metadata.group_id.isdecimal() and int(message.metadata.group_id) > 0:
            return int(message.metadata.group_id)
        return self._open + 1 if category == "train" or not self._open else self._open


def merged(server: Mapping[str, float], evaluate: Mapping[str, float], train: Mapping[str, float]) -> dict[str, float]:
    """Merge a round's metrics into one mapping: the server's first; a taken name gets its origin as a prefix."""
    metrics = {name: value for name, value in server.items() if math.isfinite(value)}
    for origin, more in (("clients", evaluate), ("train", train)):
        for name, value in more.items():
            metrics[f"{origin}_{name}" if name in metrics else name] = value
    return metrics


def _category(message: Message) -> str:
    return message.metadata.message_type.partition(".")[0]
