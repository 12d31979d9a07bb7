"""A worker's training of chunks: it trains clients, and keeps a sum if the rule merges.

Updates pass the same guard and are folded by the same rule as on the server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from edgefl.aggregation import Rule, make_rule
from edgefl.aggregation.evaluations import FederatedEvaluation
from edgefl.aggregation.rule import Merging
from edgefl.config import JobConfig
from edgefl.errors import UpdateRejected
from edgefl.guards import RoundGuard
from edgefl.records import Answer, Evaluated, EvaluationSpec, Failure, Partial, Plan, Update
from edgefl.rounds import NO_EVALUATION, MetricSums
from edgefl.simulation.engines.attempt import Attempt
from edgefl.simulation.engines.client_states import ClientStates
from edgefl.simulation.engines.fleets import Population, SimulationSetup, TrainingMethod
from edgefl.simulation.engines.pool.messages import Chunk, Done, Flush, Summed, Tried
from edgefl.simulation.engines.stackable import why_not_chosen
from edgefl.simulation.engines.stacked import StackTrainer
from edgefl.simulation.engines.trainer import LocalTrainer
from edgefl.task import Task
from edgefl.training.local_evaluation import evaluation_spec


class ChunkTrainer:
    """Trains the chunks of one round after another."""

    def __init__(
        self, task: Task, population: Population, config: JobConfig, states: ClientStates | None = None
    ) -> None:
        self._task, self._population = task, population
        self._setup = SimulationSetup(
            task=task, reference=None, make_population=lambda _task: population, population=population, config=config,
            states=states,
        )  # fmt: skip
        self._trainers: dict[TrainingMethod, LocalTrainer | StackTrainer] = {}
        self._trainer: LocalTrainer | StackTrainer | None = None
        self._plan: Plan | None = None
        self._method = TrainingMethod()
        self._fault = ""  # why stacks failed
        self._rule_name = config.aggregation.rule
        self._running: _RunningSum | None = None

    def begin(self, plan: Plan, *, sums: bool, method: TrainingMethod | None = None) -> None:
        """Begin a round, and forget the previous one."""
        self._plan, self._method = plan, method or TrainingMethod()
        spec = evaluation_spec(self._task) if plan.evaluate else None
        self._running = _RunningSum(plan, self._rule_name, spec) if sums else None
        self._begin()

    def try_stacks(self, method: TrainingMethod) -> Tried:
        """Return why clients cannot be trained in stacks, if so."""
        return Tried(why_not_chosen(dataclasses.replace(self._setup, method=method)))

    def answer(self, message: Chunk | Flush) -> Done | Summed:
        if isinstance(message, Chunk):
            return self._chunk(message)
        if isinstance(message, Flush) and self._running is not None:
            return dataclasses.replace(self._running.flush(), fault=self._fault)
        raise TypeError(f"a worker cannot answer a {type(message).__name__}")

    def _chunk(self, chunk: Chunk) -> Done:
        if isinstance(self._trainer, StackTrainer):  # only if updates are summed
            return self._in_stacks(self._trainer, chunk.clients)
        if self._trainer is None:
            raise RuntimeError("begin comes before a chunk")
        if self._running is None:
            return Done(tuple(map(self._trainer.answer, chunk.clients)))
        return self._take(self._trainer.train(client, borrow=True) for client in chunk.clients)

    def _in_stacks(self, trainer: StackTrainer, clients: Sequence[str]) -> Done:
        """Train clients in stacks; after a failure, train the remaining ones and all later ones one by one."""
        num_done = 0
        for stack in trainer.stacks(clients):
            with Attempt("stacks") as attempt:
                answers = list(trainer.answers(stack, sums=True))
            if attempt.fault:
                self._fault = attempt.fault
                self._begin()
                return self._chunk(Chunk(tuple(clients[num_done:])))
            self._take(answers)
            num_done += len(stack)
        return Done()

    def _begin(self) -> None:
        """Create the trainer for the method; if stacks fail, the one that trains one by one."""
        if self._method.stacks and not self._fault:
            with Attempt("stacks") as attempt:
                self._trainer = self._taken_up(self._method)
                return
            self._fault = attempt.fault
        self._trainer = self._taken_up(dataclasses.replace(self._method, stacks=False))

    def _taken_up(self, method: TrainingMethod) -> LocalTrainer | StackTrainer:
        if self._plan is None:
            raise RuntimeError("a plan comes before a trainer")
        if method not in self._trainers:
            task, population, states = self._task, self._population, self._setup.states
            stacks, single = StackTrainer, LocalTrainer
            self._trainers[method] = (
                stacks(task, population, method) if method.stacks else single(task, population, method, states)
            )
        self._trainers[method].begin(self._plan)
        return self._trainers[method]

    def _take(self, answers: Iterable[Answer]) -> Done:
        for answer in answers:
            if self._running is not None:
                self._running.take(answer)
        return Done()


class _RunningSum:
    """The sum of a round so far."""

    def __init__(self, plan: Plan, rule: str, spec: EvaluationSpec | None) -> None:
        self._plan, self._rule_name, self._spec = plan, rule, spec
        self._reset()

    def take(self, answer: Answer) -> None:
        """Fold what the guard admits; keep separately what the server must see as single answers."""
        if isinstance(answer, Evaluated):
            raise TypeError("an evaluation without an update cannot be summed")
        if isinstance(answer, Failure):
            self._aside.append(answer)
            return
        if isinstance(answer, Partial):  # the stack's sum of finite updates
            self._guard.admit_partial(answer)
            self._rule.merge(answer)
            self._metrics.merge(answer.metrics)
            if self._evaluation is not None and answer.evaluations is not None:
                self._evaluation.merge(answer.evaluations)
            self._any = True
            return
        try:
            self._guard.admit(answer)
        except UpdateRejected:
            own = {name: array.copy() for name, array in answer.tree.items()}  # the tree was borrowed
            self._aside.append(dataclasses.replace(answer, tree=own))
            return
        self._rule.add(answer)
        self._metrics.add(answer.weight, answer.metrics)
        if self._evaluation is not None:
            self._evaluation.add(answer.device, answer.evaluation or NO_EVALUATION)
        self._any = True

    def flush(self) -> Summed:
        partial = self._rule.partial() if self._any and isinstance(self._rule, Merging) else None
        if partial is not None:
            evaluations = self._evaluation.partial() if self._evaluation is not None else None
            partial = dataclasses.replace(partial, metrics=self._metrics.sums, evaluations=evaluations)
        summed = Summed(partial, tuple(self._aside))
        self._reset()
        return summed

    def _reset(self) -> None:
        self._guard = RoundGuard(self._plan)
        self._rule: Rule = make_rule(self._rule_name, self._plan.parameters)
        self._metrics = MetricSums()
        self._evaluation = FederatedEvaluation(self._spec) if self._spec is not None else None
        self._aside: list[Update | Failure] = []
        self._any = False
