"""Worker processes, one thread each: for models whose steps are real work, on all cores.

Clients are handed out in chunks to whoever is free. Where the rule merges, a worker returns one sum
for all that it trained in a round, instead of an update a client. A worker that dies, or says nothing
within the round's deadline, is replaced; its clients are handed out again, one by one where it was at
work on them, and a client that ends its worker twice fails.
Invariant: each client of a cohort is counted once, whoever dies when.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from edgefl.aggregation import make_rule
from edgefl.aggregation.rule import Merging
from edgefl.errors import ConfigError
from edgefl.records import Failure, Partial, Plan, Traffic, Update
from edgefl.simulation.fleets import Meter, Setup
from edgefl.simulation.machine import num_cores
from edgefl.simulation.pool_process import WorkerProcess
from edgefl.simulation.pool_wire import Begin, Chunk, Flush, Summed
from edgefl.simulation.shared import SharedTree
from edgefl.training import initial_parameters
from edgefl.trees import spec_of

CHUNKS_PER_WORKER = 8  # of a round: small enough that workers end together
MAX_CHUNK = 32
MAX_DEATHS = 2  # a client that has ended so many workers is not tried again

_Answer = Update | Failure | Partial


class PoolFleet:
    """Trains a cohort on worker processes."""

    def __init__(self, setup: Setup, num_workers: int | None = None) -> None:
        self._setup = setup
        self._meter = Meter()
        self._parameters = SharedTree(spec_of(initial_parameters(setup.task, setup.config.train.seed)))
        self.workers: list[WorkerProcess] = []
        try:
            for _ in range(num_workers or num_cores()):
                self.workers.append(WorkerProcess(setup, self._parameters))
            for worker in self.workers:
                worker.wait_until_ready()
        except ConfigError:
            self.close()
            raise

    @property
    def peak_rss_mb(self) -> float:
        """Return the sum of the workers' peaks, as far as they have told."""
        return sum(worker.peak_rss_mb for worker in self.workers)

    def clients(self) -> Sequence[str]:
        return self._setup.population.names()

    def collect(self, plan: Plan) -> Iterator[_Answer]:
        self._meter.begin(plan)
        rule = make_rule(self._setup.config.aggregation.rule, plan.parameters)
        sums = rule.merges and isinstance(rule, Merging) and self._setup.takes_sums(plan)
        self._parameters.write(plan.parameters)
        for answer in _Round(plan, self.workers, self._setup.stop, sums=sums).run():
            up = len(answer.contributors) if isinstance(answer, Partial) else int(isinstance(answer, Update))
            self._meter.count(down=up or 1, up=up)
            yield answer

    def traffic(self) -> Traffic:
        return self._meter.traffic()

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.close()
        self._parameters.close()


@dataclass(slots=True)
class _Work:
    """Some clients to train."""

    clients: tuple[str, ...]
    deaths: int = 0  # of workers, while at work on it


@dataclass(slots=True)
class _Hand:
    """One worker in one round."""

    process: WorkerProcess
    at_work: _Work | None = None
    flushing: bool = False
    summed: list[_Work] = field(default_factory=list)  # trained, in the worker's sum, not ours yet

    @property
    def busy(self) -> bool:
        return self.at_work is not None or self.flushing


class _Round:
    def __init__(self, plan: Plan, workers: Sequence[WorkerProcess], stop: threading.Event, *, sums: bool) -> None:
        self._plan, self._stop, self._sums = plan, stop, sums
        self._hands = [_Hand(worker) for worker in workers]
        most = len(plan.clients) // (len(workers) * CHUNKS_PER_WORKER) if sums else 1
        size = max(1, min(MAX_CHUNK, most))
        self._todo = deque(_Work(plan.clients[i : i + size]) for i in range(0, len(plan.clients), size))
        self._held: dict[str, Update | Failure] = {}  # single answers that wait for those before them
        self._order = deque(() if sums else plan.clients)

    def run(self) -> Iterator[_Answer]:
        """Yield the round's answers: sums as they come, single ones in the plan's order."""
        for hand in self._hands:
            self._begin(hand)
        while self._hand_out():
            pipes: dict[Any, _Hand] = {hand.process.pipe: hand for hand in self._hands if hand.busy}
            ready = wait(list(pipes), self._plan.deadline_s)
            for pipe in ready:
                yield from self._hear(pipes[pipe])
            if not ready:
                for hand in pipes.values():
                    yield from self._lost(hand, f"no answer within {self._plan.deadline_s:g} s")

    def _begin(self, hand: _Hand) -> None:
        hand.process.settle(self._plan.deadline_s)
        hand.process.send(Begin(dataclasses.replace(self._plan, parameters={}), self._sums))

    def _hand_out(self) -> bool:
        """Give every free worker something to do; return whether anyone is busy."""
        if self._stop.is_set():
            self._todo.clear()
        for hand in self._hands:
            if hand.busy:
                continue
            if self._todo and self._may_begin(self._todo[0]):
                hand.at_work = self._todo.popleft()
                hand.process.ask(Chunk(hand.at_work.clients))
            elif hand.summed:
                hand.flushing = True
                hand.process.ask(Flush())
        return any(hand.busy for hand in self._hands)

    def _may_begin(self, work: _Work) -> bool:
        """Single answers are not piled up: far ahead of who is waited for, nobody begins."""
        return self._sums or len(self._held) < CHUNKS_PER_WORKER * len(self._hands) or self._order[0] in work.clients

    def _hear(self, hand: _Hand) -> Iterator[_Answer]:
        answer = hand.process.hear()
        if answer is None:
            yield from self._lost(hand, f"its worker {hand.process.ended()}")
        elif isinstance(answer, Summed):
            hand.flushing, hand.summed = False, []
            yield from answer.aside
            if answer.partial is not None:  # a copy: the worker may sum again, if another dies
                total = {name: array.copy() for name, array in hand.process.sums.tree.items()}
                yield dataclasses.replace(answer.partial, total=total)
        elif hand.at_work is not None:
            if self._sums:
                hand.summed.append(hand.at_work)
            hand.at_work = None
            yield from self._in_order(answer.answers)

    def _in_order(self, answers: Sequence[Update | Failure]) -> Iterator[Update | Failure]:
        self._held |= {answer.device: answer for answer in answers}
        while self._order and self._order[0] in self._held:
            yield self._held.pop(self._order.popleft())

    def _lost(self, hand: _Hand, why: str) -> Iterator[_Answer]:
        """Replace a worker, and hand out again what it had."""
        again = [(work, work.deaths + hand.flushing) for work in hand.summed]
        again += [(hand.at_work, hand.at_work.deaths + 1)] if hand.at_work is not None else []
        hand.at_work, hand.flushing, hand.summed = None, False, []
        hand.process.restart()
        self._begin(hand)
        for work, deaths in again:
            if deaths == work.deaths:
                self._todo.appendleft(work)
            elif deaths < MAX_DEATHS:
                self._todo.extendleft(_Work((client,), deaths) for client in reversed(work.clients))
            else:
                yield from self._failed(work, why)

    def _failed(self, work: _Work, why: str) -> Iterator[_Answer]:
        plan = self._plan
        failures = [Failure(job=plan.job, round=plan.round, device=client, reason=why) for client in work.clients]
        yield from failures if self._sums else self._in_order(failures)
