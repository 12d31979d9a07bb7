"""One round on workers of any kind: clients in chunks, whose answers come as sums or in the plan's order.

Clients go to any free worker. If the rule merges, a worker returns one sum for all clients that it trained in
a round, instead of one update per client. Other workers train the clients of a lost worker again, one by one those
that it was training (`edgefl/process/workers/pool.py`). A client that ends its worker twice fails: in this round,
and in every later one without another try.
Invariant: each client of a cohort is counted once, even if workers are lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgefl.aggregation import rule_kind
from edgefl.errors import ConfigError
from edgefl.process.workers.pool import MAX_LOSSES, ItemAnswered, ItemGivenUp, NoWorkerLeft, RunTerms, WorkerPool
from edgefl.process.workers.work_queue import WorkQueue
from edgefl.records import Answer, Evaluated, Failure, Plan, Update
from edgefl.simulation.engines.fleets import Meter, SimulationSetup
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk, Done, Flush, Summed
from edgefl.trees import Tree

LEFT_PER_CHUNK = 4  # a chunk is this fraction of a worker's remaining share, so that workers end together
MAX_CHUNK = 32
AHEAD = 8  # clients per worker whose single answers may wait for an earlier one
STACKS_PER_WORKER = 2  # for clients trained in stacks, because larger stacks are faster
MAX_STACKED = 1024


@dataclass(slots=True)
class PoolHistory:
    """What a fleet keeps about its workers from round to round."""

    deadly: dict[str, str] = field(default_factory=dict)  # clients that ended their workers, and how
    stack_faults: list[str] = field(default_factory=list)  # why stacks failed, so that clients were trained one by one


def train(
    setup: SimulationSetup, meter: Meter, plan: Plan, pool: WorkerPool[Any, Any], history: PoolHistory
) -> Iterator[Answer]:
    """Train a plan's clients on workers that have its parameters; counts the bytes that a fleet would transfer."""
    meter.begin(plan)
    for answer in Round(setup, plan, pool, history).run():
        meter.count(answer)
        yield answer


class Round:
    """A plan, and the workers for it."""

    def __init__(
        self, setup: SimulationSetup, plan: Plan, pool: WorkerPool[Any, Any], history: PoolHistory
    ) -> None:  # fmt: skip
        self._plan, self._pool, self._history = plan, pool, history
        self._sums = plan.fit and rule_kind(setup.config.aggregation.rule).merges and setup.takes_sums(plan)
        self._method = dataclasses.replace(setup.method, stacks=self._sums and setup.method.stacks)
        self._held: dict[str, Update | Failure | Evaluated] = {}  # single answers that wait for earlier ones
        self._order = deque(() if self._sums else plan.clients)
        chunks = self._chunks(tuple(client for client in plan.clients if client not in history.deadly))
        self._work = WorkQueue(
            map(Chunk, chunks), split=_one_by_one, stopped=setup.stop.is_set, may_begin=self._may_begin
        )  # fmt: skip

    def run(self) -> Iterator[Answer]:
        """Yield the round's answers: sums as they arrive, single answers in the plan's order."""
        for client in self._plan.clients:
            if client in self._history.deadly:
                yield from self._failed((client,), self._history.deadly[client])
        terms = RunTerms(
            answer_s=self._plan.deadline_s, opening=self._opening(), collect=Flush() if self._sums else None
        )  # fmt: skip
        for event in self._pool.run(self._work, terms):
            if isinstance(event, NoWorkerLeft):
                raise ConfigError(f"round {self._plan.round}: no worker can be started: the last one {event.how}")
            if isinstance(event, ItemGivenUp):
                yield from self._gave_up(event)
            else:
                yield from self._answered(event)

    def _chunks(self, clients: Sequence[str]) -> Sequence[tuple[str, ...]]:
        """Split clients into stacks, into chunks that are summed, or into single clients."""
        if self._method.stacks:
            size = math.ceil(len(clients) / (self._pool.size * STACKS_PER_WORKER))
            size = max(1, min(MAX_STACKED, size))
            return [tuple(clients[i : i + size]) for i in range(0, len(clients), size)]
        return _guided(clients, self._pool.size) if self._sums else [(client,) for client in clients]

    def _opening(self) -> BeginRound:
        frozen: Tree | None = None if self._plan.frozen is None else {}
        plan = dataclasses.replace(self._plan, parameters={}, frozen=frozen)
        return BeginRound(plan, self._sums, self._method)

    def _may_begin(self, chunk: Chunk) -> bool:
        """Whether a chunk may begin: single answers must not pile up far ahead of the next one in order."""
        few = len(self._held) < AHEAD * self._pool.size
        return self._sums or few or self._order[0] in chunk.clients

    def _answered(self, event: ItemAnswered[Chunk]) -> Iterator[Answer]:
        answer: Done | Summed = event.answer
        if isinstance(answer, Done):
            yield from self._in_order(answer.answers)
            return
        if answer.fault:
            self._history.stack_faults.append(answer.fault)
        yield from answer.aside
        if answer.partial is not None:
            yield answer.partial

    def _gave_up(self, event: ItemGivenUp[Chunk]) -> Iterator[Answer]:
        why = f"its worker {event.how}"
        if event.died:
            self._history.deadly |= dict.fromkeys(event.message.clients, f"{why}, each of {MAX_LOSSES} times")
        yield from self._failed(event.message.clients, why)

    def _in_order(self, answers: Sequence[Update | Failure | Evaluated]) -> Iterator[Update | Failure | Evaluated]:
        self._held |= {answer.device: answer for answer in answers}
        while self._order and self._order[0] in self._held:
            yield self._held.pop(self._order.popleft())

    def _failed(self, clients: Sequence[str], why: str) -> Iterator[Answer]:
        plan = self._plan
        failures = [Failure(job=plan.job, round=plan.round, device=client, reason=why) for client in clients]
        yield from failures if self._sums else self._in_order(failures)


def _one_by_one(chunk: Chunk) -> Sequence[Chunk]:
    return [Chunk((client,)) for client in chunk.clients]


def _guided(clients: Sequence[str], workers: int) -> list[tuple[str, ...]]:
    """Split clients into chunks that get smaller (guided self-scheduling, Polychronopoulos & Kuck 1987)."""
    chunks, start = [], 0
    while start < len(clients):
        size = max(1, min(MAX_CHUNK, (len(clients) - start) // (workers * LEFT_PER_CHUNK)))
        chunks.append(tuple(clients[start : start + size]))
        start += size
    return chunks
