"""Rounds: choose a cohort, send the plan, admit and fold updates as they arrive, step, repeat.

The same code runs in the cloud, in a region and in simulation; only the fleet differs.
Invariants: a refused update changes nothing; losing one device is normal; a round below its quorum
raises; the updates of a cohort are never all in memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgefl.aggregation import make_rule
from edgefl.aggregation.evaluations import FederatedEvaluation
from edgefl.aggregation.rule import Rule
from edgefl.aggregation.schedules import of_round, server_factor
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.choosing.combined import LATE_NEXT
from edgefl.choosing.history import History
from edgefl.choosing.utility import draw_by_utility
from edgefl.config import JobConfig
from edgefl.errors import QuorumNotMet, UpdateRejected
from edgefl.exchange import cohort_size
from edgefl.guards import DEVICES, RoundGuard, integer_moves, is_late, refuse_unsound
from edgefl.records import (
    Answer,
    DeviceEvaluation,
    Evaluated,
    EvaluationSpec,
    Failure,
    Partial,
    Plan,
    RegionRound,
    RoundOutcome,
    SeenUpdate,
    Traffic,
    Update,
)
from edgefl.stopping import EarlyStop
from edgefl.terminal.text import grouped
from edgefl.trees import Tree
from edgefl.trees.fragments import sent_fragment, sent_part
from edgefl.trees.scratch import settled
from edgefl.trees.views import joined

Clock = Callable[[], float]  # seconds, monotonic
OnRefusal = Callable[[Plan, Update | Partial, str], None]
TRAIN_LOSS = "train_loss"  # the metric of an update by which its device's utility is judged
MAX_REASONS = 5  # different ones, in the message of a round under its quorum
NO_EVALUATION = DeviceEvaluation(fault="it sent no evaluation; an agent of an older version cannot. Update it")


def ignored(_plan: Plan, _answer: Update | Partial, _reason: str) -> None:
    """Do nothing about a refusal, which the outcome reports anyway."""


class Fleet(Protocol):
    """Sends plans to clients and returns their answers."""

    def clients(self) -> Sequence[str]:
        """Return the clients that can take part now."""

    def collect(self, plan: Plan) -> Iterator[Answer]:
        """Send the plan and yield answers as they arrive, until the plan's deadline at the latest.

        A partial sum represents all its contributors; only a rule that merges accepts it. Closing the
        iterator early tells the fleet that later answers are not needed.
        """

    def traffic(self) -> Traffic:
        """Return the bytes transferred so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One federated training, ready to run: where it starts, and what hears of refusals."""

    id: str
    config: JobConfig
    step: ServerOptimizer
    first_round: int = 1
    cohort: tuple[str, ...] = ()  # of the first round, if it was already announced
    owed: tuple[str, ...] = ()  # clients whose update of the round before the first one is also taken
    clock: Clock = field(default=time.monotonic)
    on_refusal: OnRefusal = field(default=ignored)
    keep: Callable[[Tree], Tree] = field(default=settled)  # e.g. to memory-mapped files
    frozen: Tree | None = None  # see `Plan`
    evaluation: EvaluationSpec | None = None  # what devices evaluate; None = the task has no evaluation on devices
    history: History | None = None  # of the clients in earlier rounds, if cohorts depend on it
    times_clients: bool = True  # whether `clock` says how long clients take, not how fast this machine simulates them
    stop: EarlyStop | None = None  # knows the metrics of earlier rounds


@dataclass(frozen=True, kw_only=True, slots=True)
class LastEvaluation:
    """The devices' evaluation of a job's last parameters, after its last round."""

    metrics: Mapping[str, float] = field(default_factory=dict)  # `devices/..`; empty = no device evaluated
    not_evaluated: Mapping[str, str] = field(default_factory=dict)  # device -> why its evaluation does not count
    reason: str = ""  # why no device was asked

    @property
    def fault(self) -> str:
        """Why the last parameters have no evaluation by devices; empty if they have one, or none was asked for."""
        why = self.reason or ("" if self.metrics else grouped(self.not_evaluated))
        return f"the last model was not evaluated on devices: {why}" if why else ""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {"metrics": dict(self.metrics), "not_evaluated": dict(self.not_evaluated), "reason": self.reason}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> LastEvaluation:
        """Read the result of `as_json`; ignores other keys."""
        return cls(**{name: said[name] for name in ("metrics", "not_evaluated", "reason") if name in said})


def run_rounds(job: Job, fleet: Fleet, parameters: Tree) -> Iterator[RoundOutcome]:
    """Run the job's rounds and yield each outcome, to the last or the early stop; raises QuorumNotMet, StepFailed."""
    cohort, owed = job.cohort, job.owed
    for number in range(job.first_round, job.config.rounds.count + 1):
        if job.stop is not None and job.stop.reason():
            return
        plan = Plan(
            job=job.id,
            round=number,
            parameters=parameters,
            clients=cohort or select_clients(fleet.clients(), job.config, number, job.history),
            train=of_round(job.config, number),
            deadline_s=job.config.rounds.deadline_s,
            frozen=job.frozen,
            evaluate=job.evaluation is not None and job.config.rounds.evaluates_in(number),
            owed=owed,
        )
        outcome = run_round(job, fleet, plan, is_resumed=bool(cohort))
        if job.history is not None:
            job.history.note(outcome)
        if job.stop is not None:
            job.stop.note(number, outcome.metrics)
        yield outcome
        parameters, cohort, owed = outcome.parameters, (), owed_after(outcome, job.config)


def owed_after(outcome: RoundOutcome, config: JobConfig) -> tuple[str, ...]:
    """Return the clients whose update of a round that is over counts in the next one."""
    return outcome.missing if config.rounds.late == LATE_NEXT and outcome.round < config.rounds.count else ()


def run_round(job: Job, fleet: Fleet, plan: Plan, *, is_resumed: bool = False) -> RoundOutcome:
    """Run one round to its end; raises QuorumNotMet with every client's reason, and StepFailed.

    If the round is resumed after a restart, it is not known how long its updates took.
    """
    start_s, before = job.clock(), fleet.traffic()
    wanted = job.config.rounds.clients or len(plan.clients)
    guard = RoundGuard(plan)
    rule = make_rule(job.config.aggregation.rule, sent_part(plan.parameters, plan.train))
    tally = _Tally(evaluation=FederatedEvaluation(job.evaluation) if plan.evaluate and job.evaluation else None)
    answer: Answer | None = None
    for answer in fleet.collect(plan):
        if isinstance(answer, Failure | Evaluated):
            tally.note_failure(answer)
            continue
        try:
            if isinstance(answer, Partial):
                guard.admit_partial(answer)
                rule.merge(answer)
            else:
                guard.admit(answer)
                rule.add(answer)
        except UpdateRejected as refusal:
            if isinstance(answer, Partial) or not is_late(answer, plan):
                tally.refuse(answer, refusal.reason)
            job.on_refusal(plan, answer, refusal.reason)
            continue
        if isinstance(answer, Update) and is_late(answer, plan):
            tally.count_late(answer)
            continue
        tally.count(answer, job.clock() - start_s if job.times_clients and not is_resumed else None)
        if len(tally.admitted) >= wanted:
            break
    answer = None  # free its tensors before the step allocates memory
    if len(tally.admitted) < job.config.rounds.quorum:
        raise QuorumNotMet(tally.under_quorum(plan, job.config.rounds.quorum))
    moved = fleet.traffic() - before
    parameters = _step(job, plan, rule)
    return RoundOutcome(
        job=plan.job,
        round=plan.round,
        parameters=job.keep(parameters),
        admitted=tuple(tally.admitted),
        rejected=tally.rejected,
        failed=tally.failed,
        missing=tally.missing(plan),
        weight=tally.weight,
        metrics=tally.metrics(),
        seconds=job.clock() - start_s,
        up_bytes=moved.up_bytes,
        down_bytes=moved.down_bytes,
        not_evaluated={} if tally.evaluation is None else tally.evaluation.faults,
        seen=tally.seen,
        regions=tally.regions,
        late=tuple(tally.late),
    )


def evaluate_last(job: Job, fleet: Fleet, parameters: Tree, *, done: int | None = None) -> LastEvaluation:
    """Let a cohort of devices evaluate the parameters after the last round, as the round after it, without training.

    `done` is the last round, if the job was stopped early.
    Devices that fail are reported: the training is done, so a lack of evaluations is no error.
    """
    rounds = job.config.rounds
    if job.evaluation is None or rounds.evaluate_every == 0:
        return LastEvaluation()
    number = (rounds.count if done is None else done) + 1
    try:  # a job that was resumed after its last round may have announced it already
        cohort = job.cohort if job.first_round == number else ()
        clients = cohort or select_clients(fleet.clients(), job.config, number, job.history)
    except QuorumNotMet as few:
        return LastEvaluation(reason=str(few))
    plan = Plan(
        job=job.id, round=number, parameters=parameters, clients=clients, train=job.config.train,
        deadline_s=rounds.deadline_s, frozen=job.frozen, evaluate=True, fit=False,
    )  # fmt: skip
    evaluation, left, wanted = FederatedEvaluation(job.evaluation), set(clients), rounds.clients or len(clients)
    for answer in fleet.collect(plan):
        if not isinstance(answer, Partial) and answer.round != number:
            continue  # not asked for
        for device, one in _evaluations_in(answer).items():
            if device not in left:
                continue  # a second time
            left.remove(device)
            if isinstance(one, str):
                evaluation.faults[device] = one
            else:
                evaluation.add(device, one)
        if evaluation.count >= wanted:
            break
    if evaluation.count < wanted:
        late = f"no answer within {plan.deadline_s:g} s"
        evaluation.faults.update((client, late) for client in clients if client in left)
    return LastEvaluation(metrics=evaluation.metrics(), not_evaluated=evaluation.faults)


def _evaluations_in(answer: Answer) -> Mapping[str, DeviceEvaluation | str]:
    """Return what each device of an answer measured, or why it did not."""
    if isinstance(answer, Partial):
        return answer.device_evaluations
    if isinstance(answer, Evaluated):
        return {answer.device: answer.evaluation}
    return {
        answer.device: answer.reason if isinstance(answer, Failure) else "it sent an update, but was asked to evaluate"
    }


def _step(job: Job, plan: Plan, rule: Rule) -> Tree:
    """Return the parameters after the server's step; raises StepFailed if they leave the range of their dtypes.

    Those of a large model are computed, and checked, when they are read. Other fragments than the round's stay.
    """
    part = dataclasses.replace(plan, parameters=sent_part(plan.parameters, plan.train))
    with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the tensor's name
        mean = rule.result()
        moves = integer_moves(mean)
        factor, fragment = server_factor(job.config, plan.train), sent_fragment(plan.train)
        new = job.step.step(part.parameters, mean, lr_factor=factor, fragment=fragment)
    new = refuse_unsound(part, moves, new, job.step.fault())
    return new if plan.train.fragments == 1 else joined(plan.parameters, new)


def select_clients(
    available: Sequence[str], config: JobConfig, round_number: int, history: History | None = None
) -> tuple[str, ...]:
    """Draw a round's cohort, seeded by (seed, round), by lot or by utility; all clients if `rounds.clients` is 0.

    Raises QuorumNotMet if fewer clients are available than the quorum.
    """
    rounds = config.rounds
    if len(available) < rounds.quorum:
        that_meet, wider = (" that meet rounds.select", ", or widen rounds.select") if rounds.select else ("", "")
        raise QuorumNotMet(
            f"round {round_number}: {len(available)} clients are available{that_meet}, the quorum is {rounds.quorum}. "
            f"Start more agents, or lower rounds.quorum{wider}."
        )
    # If already sorted: do not materialise a million names.
    ordered = available if getattr(available, "in_order", False) else sorted(available)
    wanted = cohort_size(rounds)
    if rounds.clients == 0 or wanted >= len(ordered):
        return tuple(ordered)
    rng = np.random.default_rng([config.train.seed, round_number])
    if rounds.utility == "oort":
        known = history if history is not None else History()
        return tuple(sorted(draw_by_utility(
            ordered, wanted, known, round_number=round_number, fairness=rounds.fairness, rng=rng
        )))  # fmt: skip
    return tuple(ordered[i] for i in sorted(rng.choice(len(ordered), wanted, replace=False)))


def without_devices(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a round's metrics that are of the parameters after it: all but those of federated evaluation."""
    return {name: value for name, value in metrics.items() if not name.startswith(DEVICES)}


@dataclass(slots=True)
class MetricSums:
    """Weighted means of metrics, kept as sums that can be added in any order, also across regions."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)  # (sum of weight * value, of weights)

    def add(self, weight: float, metrics: Mapping[str, float]) -> None:
        self.merge({name: (weight * value, weight) for name, value in metrics.items()})

    def merge(self, sums: Mapping[str, tuple[float, float]]) -> None:
        for name, (total, weight) in sums.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + total, before[1] + weight)

    def means(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self.sums.items()}


@dataclass(slots=True)
class _Tally:
    """Which client answered what in a round."""

    admitted: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    weight: float = 0.0
    evaluation: FederatedEvaluation | None = None  # None: the plan asks for none
    seen: dict[str, SeenUpdate] = field(default_factory=dict)
    regions: dict[str, RegionRound] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)  # whose update of the round before was admitted
    _metrics: MetricSums = field(default_factory=MetricSums)

    def count(self, answer: Update | Partial, seconds: float | None) -> None:
        self.weight += answer.weight
        if isinstance(answer, Partial):
            self.admitted.extend(answer.contributors)
            self._metrics.merge(answer.metrics)
            for device, weight in answer.weights.items():
                self.seen[device] = SeenUpdate(weight=weight, loss=answer.losses.get(device), seconds=seconds)
            for name, part in answer.regions.items():
                self.regions[name] = self.regions[name] + part if name in self.regions else part
            if self.evaluation is not None and answer.evaluations is not None:
                self.evaluation.merge(answer.evaluations)
            if self.evaluation is not None:
                for device, one in answer.device_evaluations.items():
                    self.evaluation.add(device, one)
        else:
            self.admitted.append(answer.device)
            loss = answer.metrics.get(TRAIN_LOSS)
            self.seen[answer.device] = SeenUpdate(weight=answer.weight, loss=loss, seconds=seconds)
            self._metrics.add(answer.weight, answer.metrics)
            if self.evaluation is not None:
                self.evaluation.add(answer.device, answer.evaluation or NO_EVALUATION)

    def count_late(self, update: Update) -> None:
        """Count an update of the round before: not in the quorum, and without its evaluation, of other parameters."""
        self.weight += update.weight
        self.late.append(update.device)
        self._metrics.add(update.weight, update.metrics)

    def note_failure(self, answer: Failure | Evaluated) -> None:
        refused = isinstance(answer, Failure) and answer.refused
        why = answer.reason if isinstance(answer, Failure) else "it sent no update"
        (self.rejected if refused else self.failed)[answer.device] = why

    def refuse(self, answer: Update | Partial, reason: str) -> None:
        """Record a refusal; for a partial sum, of each contributor that was not admitted otherwise."""
        names = answer.contributors if isinstance(answer, Partial) else (answer.device,)
        counted = set(self.admitted) if isinstance(answer, Partial) else set()
        self.rejected |= {name: reason for name in names if name not in counted}

    def metrics(self) -> dict[str, float]:
        return {**self._metrics.means(), **(self.evaluation.metrics() if self.evaluation is not None else {})}

    def missing(self, plan: Plan) -> tuple[str, ...]:
        answered = {*self.admitted, *self.rejected, *self.failed}
        return tuple(client for client in plan.clients if client not in answered)

    def under_quorum(self, plan: Plan, quorum: int) -> str:
        late = dict.fromkeys(self.missing(plan), f"no answer within {plan.deadline_s:g} s")
        reasons = {**self.rejected, **self.failed, **late}
        return (
            f"round {plan.round} of job {plan.job}: {len(self.admitted)} of {len(plan.clients)} updates "
            f"admitted, the quorum is {quorum}. "
            + grouped({client: reasons[client] for client in plan.clients if client in reasons}, MAX_REASONS)
        )
