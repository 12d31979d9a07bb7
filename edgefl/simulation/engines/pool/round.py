"""One round on workers, wherever they run: handed out in chunks, heard, and done again where one is lost.

Clients are handed out to whoever is free. Where the rule merges, a worker returns one sum for all that
it trained in a round, instead of an update a client. A worker that is lost, or says nothing within the
round's deadline, is started again while the others go on; its clients are handed out again, one by one
where it was at work on them, and a client that ends its worker twice fails: in this round, and in every
later one without being tried again.
Invariant: each client of a cohort is counted once, whoever dies when.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from edgefl.aggregation import make_rule
from edgefl.aggregation.rule import Merging
from edgefl.errors import ConfigError
from edgefl.records import Failure, Partial, Plan, Update
from edgefl.simulation.engines.fleets import Meter, SimulationSetup, TrainingMethod
from edgefl.simulation.engines.pool.messages import Begin, Chunk, Done, Flush, Gone, Ready, Summed
from edgefl.trees import Tree

LEFT_PER_CHUNK = 4  # a chunk is so small a part of a worker's share of what is left that workers end together
MAX_CHUNK = 32
AHEAD = 8  # clients a worker, whose single answers may wait for one before them
STACKS_PER_WORKER = 2  # and of whom a worker trains as one, since larger stacks are faster
MAX_STACKED = 1024
MAX_DEATHS = 2  # a client that has ended so many workers is not tried again
MAX_STARTS = 3  # of a worker in one round
START_S = 120.0

Answer = Update | Failure | Partial


class Worker(Protocol):
    """One worker, from the round's side. What it does takes its time: `wait` tells who has answered."""

    ready: bool  # whether it has said so since it was started

    def begin(self, begin: Begin) -> None:
        """Tell it of a round, and forget what it still owes of the one before."""

    def ask(self, message: Chunk | Flush) -> None:
        """Give it something to answer."""

    def hear(self) -> Ready | Done | Summed | Gone:
        """Return the answer that is there; raises ConfigError where it cannot work on this task at all."""

    def restart(self) -> None:
        """End it and start another in its place, which will say that it is ready."""


_W = TypeVar("_W", bound=Worker)
Wait = Callable[[Sequence[_W], float], Sequence[_W]]  # for any of them, so many seconds; returns who has answered


def train(
    setup: SimulationSetup, meter: Meter, plan: Plan, workers: Sequence[_W], wait: Wait[_W], deadly: dict[str, str]
) -> Iterator[Answer]:  # fmt: skip
    """Train a plan's clients on workers that have its parameters; counts what a fleet would have moved.

    Clients that end their workers are noted in `deadly`, and whoever stands there is not tried.
    """
    rule = make_rule(setup.config.aggregation.rule, plan.parameters)
    sums = rule.merges and isinstance(rule, Merging) and setup.takes_sums(plan)
    meter.begin(plan)
    for answer in Round(plan, workers, wait, setup.stop, sums=sums, method=setup.method, deadly=deadly).run():
        meter.count(answer)
        yield answer


@dataclass(slots=True)
class _Work:
    """Some clients to train."""

    clients: tuple[str, ...]
    deaths: int = 0  # of workers, while at work on it


@dataclass(slots=True)
class _Hand(Generic[_W]):
    """One worker in one round."""

    worker: _W
    at_work: _Work | None = None
    flushing: bool = False
    summed: list[_Work] = field(default_factory=list)  # trained, in the worker's sum, not ours yet
    starts: int = 0

    @property
    def busy(self) -> bool:
        return self.at_work is not None or self.flushing


class Round(Generic[_W]):
    """A plan, and the workers that there are for it."""

    def __init__(  # noqa: PLR0913 - what a fleet has for a round, each once
        self, plan: Plan, workers: Sequence[_W], wait: Wait[_W], stop: threading.Event, *, sums: bool,
        method: TrainingMethod | None = None, deadly: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._plan, self._wait, self._stop, self._sums = plan, wait, stop, sums
        method = method or TrainingMethod()
        self._method = dataclasses.replace(method, stacks=sums and method.stacks)
        self._hands = [_Hand(worker) for worker in workers]
        self._deadly = deadly if deadly is not None else {}
        clients = tuple(client for client in plan.clients if client not in self._deadly)
        if self._method.stacks:
            size = max(1, min(MAX_STACKED, math.ceil(len(clients) / (len(workers) * STACKS_PER_WORKER))))
            parts = [clients[i : i + size] for i in range(0, len(clients), size)]
        elif sums:
            parts = _guided(clients, len(workers))
        else:
            parts = [(client,) for client in clients]
        self._todo = deque(map(_Work, parts))
        self._held: dict[str, Update | Failure] = {}  # single answers that wait for those before them
        self._order = deque(() if sums else plan.clients)

    def run(self) -> Iterator[Answer]:
        """Yield the round's answers: sums as they come, single ones in the plan's order."""
        for client in self._plan.clients:
            if client in self._deadly:
                yield from self._failed(_Work((client,)), self._deadly[client])
        for hand in self._hands:
            if hand.worker.ready:
                self._begin(hand)
        while waited := self._hand_out():
            busy = any(hand.busy for hand in waited)
            within_s = self._plan.deadline_s if busy else START_S  # a deadline is for work, not for a start
            answered = self._wait([hand.worker for hand in waited], within_s)
            for hand in waited:
                if hand.worker in answered:
                    yield from self._hear(hand)
                elif not answered and hand.busy:
                    yield from self._lost(hand, f"no answer within {within_s:g} s", died=False)
                elif not answered and not busy:
                    self._give_up(hand, f"it was not ready within {within_s:g} s")

    def _begin(self, hand: _Hand[_W]) -> None:
        frozen: Tree | None = None if self._plan.frozen is None else {}
        plan = dataclasses.replace(self._plan, parameters={}, frozen=frozen)
        hand.worker.begin(Begin(plan, self._sums, self._method))

    def _hand_out(self) -> list[_Hand[_W]]:
        """Give every free worker something to do; return those who will answer, and are wanted to."""
        if self._stop.is_set():
            self._todo.clear()
        for hand in self._hands:
            if hand.busy or not hand.worker.ready:
                continue
            if self._todo and self._may_begin(self._todo[0]):
                hand.at_work = self._todo.popleft()
                hand.worker.ask(Chunk(hand.at_work.clients))
            elif hand.summed:
                hand.flushing = True
                hand.worker.ask(Flush())
        starting = [hand for hand in self._hands if not hand.worker.ready] if self._todo else []
        return [*(hand for hand in self._hands if hand.busy), *starting]

    def _may_begin(self, work: _Work) -> bool:
        """Single answers are not piled up: far ahead of who is waited for, nobody begins."""
        few = len(self._held) < AHEAD * len(self._hands)
        return self._sums or few or self._order[0] in work.clients or not any(hand.busy for hand in self._hands)

    def _hear(self, hand: _Hand[_W]) -> Iterator[Answer]:
        answer = hand.worker.hear()
        if isinstance(answer, Ready):
            self._begin(hand)
        elif isinstance(answer, Gone):
            yield from self._lost(hand, f"its worker {answer.how}", died=True)
        elif isinstance(answer, Summed):
            hand.flushing, hand.summed = False, []
            yield from answer.aside
            if answer.partial is not None:
                yield answer.partial
        elif hand.at_work is not None:
            if self._sums:
                hand.summed.append(hand.at_work)
            hand.at_work = None
            yield from self._in_order(answer.answers)

    def _in_order(self, answers: Sequence[Update | Failure]) -> Iterator[Update | Failure]:
        self._held |= {answer.device: answer for answer in answers}
        while self._order and self._order[0] in self._held:
            yield self._held.pop(self._order.popleft())

    def _lost(self, hand: _Hand[_W], why: str, *, died: bool) -> Iterator[Answer]:
        """Start a worker again, and hand out again what it had."""
        again = [(work, work.deaths + hand.flushing) for work in hand.summed]
        again += [(hand.at_work, hand.at_work.deaths + 1)] if hand.at_work is not None else []
        if not hand.worker.ready and hand.starts >= MAX_STARTS:
            self._give_up(hand, why)
        else:
            hand.starts = 0 if hand.worker.ready else hand.starts + 1
            hand.at_work, hand.flushing, hand.summed = None, False, []
            hand.worker.restart()
        for work, deaths in again:
            if deaths == work.deaths:
                self._todo.appendleft(work)
            elif deaths < MAX_DEATHS:
                self._todo.extendleft(_Work((client,), deaths) for client in reversed(work.clients))
            else:
                self._deadly |= dict.fromkeys(work.clients, f"{why}, each of {deaths} times") if died else {}
                yield from self._failed(work, why)

    def _give_up(self, hand: _Hand[_W], why: str) -> None:
        """Go on with the other workers; raises ConfigError where there are none."""
        self._hands.remove(hand)
        if not self._hands:
            raise ConfigError(f"round {self._plan.round}: no worker can be started: {why}")

    def _failed(self, work: _Work, why: str) -> Iterator[Answer]:
        plan = self._plan
        failures = [Failure(job=plan.job, round=plan.round, device=client, reason=why) for client in work.clients]
        yield from failures if self._sums else self._in_order(failures)


def _guided(clients: Sequence[str], workers: int) -> list[tuple[str, ...]]:
    """Cut clients into chunks that get smaller to the end (guided self-scheduling, Polychronopoulos & Kuck 1987)."""
    chunks, start = [], 0
    while start < len(clients):
        size = max(1, min(MAX_CHUNK, (len(clients) - start) // (workers * LEFT_PER_CHUNK)))
        chunks.append(tuple(clients[start : start + size]))
        start += size
    return chunks
