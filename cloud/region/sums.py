"""Partial sums between tiers: what a region sends up for all of its devices, and how its parent accepts it.

A sum travels as the weighted mean of the updates, float32 for tensors of at most 32 bits, otherwise float64, with the
weight of each contributor: half the bytes of a sum in float64, and the flat mean to 1e-6, whatever the tiers.
Hierarchical averaging with exact weights: Liu et al. 2020, "Client-Edge-Cloud Hierarchical Federated Learning".
Invariant: of each device in a sum the parent has no answer yet; otherwise the sum is not accepted, and the region folds
it again without those devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from cloud.jobs.answers import AnswerRow
from edgefl.aggregation import make_rule
from edgefl.aggregation.regional import change, regional_step
from edgefl.aggregation.rule import Merging
from edgefl.errors import ProtocolError, UpdateRejected
from edgefl.guards import RoundGuard, partial_spec
from edgefl.protocols.messages import Assignment, Evaluate
from edgefl.protocols.tiers import RegionPart, SumNote
from edgefl.records import Answer, DeviceEvaluation, Evaluated, Failure, Partial, Plan, RegionRound
from edgefl.rounds import NO_EVALUATION, TRAIN_LOSS, MetricSums
from edgefl.trees import TensorSpec, Tree, spec_of
from edgefl.trees.fragments import sent_part

_T = TypeVar("_T")
TOLERANCE = 1e-9  # of the sum of weights, relative


def sum_fault(note: SumNote, spec: Mapping[str, TensorSpec], parameters: Mapping[str, TensorSpec]) -> str:
    """Return what is wrong with a sum for these parameters; empty if nothing is."""
    if any(not math.isfinite(one) or one <= 0 for one in note.weights.values()):
        return "a contributor's weight is not finite and above 0"
    if fault := _wrong_names(note):
        return fault
    if not note.weights:
        return "" if not spec else "it has tensors, but no contributor"
    wanted = partial_spec(parameters, is_mean=True)
    if dict(spec) != wanted:
        odd = sorted(name for name in {*spec, *wanted} if spec.get(name) != wanted.get(name))
        return f"tensor {odd[0]!r} is {spec.get(odd[0])}, expected {wanted.get(odd[0])}"
    weight = math.fsum(note.weights.values())
    for name, pair in note.metrics.items():
        if len(pair) != 2 or not 0 < pair[1] <= weight * (1 + TOLERANCE):
            said = f"a weight of {pair[1]:g}" if len(pair) == 2 else f"{len(pair)} numbers"
            return f"metric {name!r} has {said}, its contributors have {weight:g}"
    return ""


def _wrong_names(note: SumNote) -> str:
    """Say which device a note names twice, or gives an evaluation without an answer; empty if none."""
    names = [*note.weights, *note.failed, *note.rejected]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        return f"{twice[0]} is both a contributor and failed, or failed twice"
    measured = {*note.evaluations, *note.evaluation_weights, *note.evaluation_faults, *note.losses}
    if others := sorted(measured - note.weights.keys()):
        return f"it has an evaluation or a loss of {others[0]!r}, which is not a contributor"
    parts = Counter(name for one in note.regions.values() for name in (*one.admitted, *one.failures))
    if others := sorted(name for name, count in parts.items() if count > 1 or name not in note.devices):
        return f"the parts of its regions name {others[0]!r} twice, or without an answer of it"
    return ""


def answers_of(note: SumNote, region: str, file: str) -> list[AnswerRow]:
    """Return the answers of the devices in a sum, as the parent stores them."""
    return [
        *(AnswerRow(device=name, file=file, weight=weight, region=region) for name, weight in note.weights.items()),
        *(AnswerRow(device=name, reason=why, region=region) for name, why in note.failed.items()),
        *(AnswerRow(device=name, reason=why, region=region, refused=True) for name, why in note.rejected.items()),
    ]


def partial_of(note: SumNote, mean: Tree) -> Partial:
    """Return the record of an accepted sum, for the round."""
    weight = math.fsum(note.weights.values())
    return Partial(
        total=mean,
        is_mean=True,
        weight=weight,
        contributors=tuple(note.weights),
        weights=note.weights,
        metrics={name: (pair[0], pair[1]) for name, pair in note.metrics.items()},
        device_evaluations={
            name: DeviceEvaluation(
                metrics=note.evaluations.get(name, {}),
                weight=note.evaluation_weights.get(name, 0.0),
                fault=note.evaluation_faults.get(name, ""),
            )
            for name in {*note.evaluations, *note.evaluation_faults}
        },
        losses=note.losses,
        regions={
            name: RegionRound(
                parent=one.parent, admitted=tuple(one.admitted), failures=one.failures, seconds=one.seconds,
                up_bytes=one.up_bytes, down_bytes=one.down_bytes,
            )
            for name, one in note.regions.items()
        },
    )  # fmt: skip


@dataclass(slots=True)
class Folding:
    """A region's sum while its devices answer."""

    plan: Plan
    rule_name: str = "mean"
    failed: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Mapping[str, float]] = field(default_factory=dict)
    evaluation_weights: dict[str, float] = field(default_factory=dict)
    evaluation_faults: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    regions: dict[str, RegionRound] = field(default_factory=dict)  # those below
    part: tuple[str, RegionRound] | None = None  # this region's name, and what its round took; None = it is not told
    # After regional rounds: the parameters before the first and before the last of them, and the first one's answers.
    base: tuple[Tree, Tree] | None = None
    evaluated: Folding | None = None
    _metrics: MetricSums = field(default_factory=MetricSums)
    _guard: RoundGuard | None = None
    _rule: Merging | None = None

    def add(self, answer: Answer) -> None:
        """Add a device's answer, or the sum of a region below."""
        guard, rule = self._parts()
        if isinstance(answer, Partial):
            self._add_sum(answer)
        elif isinstance(answer, Failure):
            (self.rejected if answer.refused else self.failed)[answer.device] = answer.reason
        elif isinstance(answer, Evaluated):
            self.weights[answer.device] = 1.0
            self._add_evaluation(answer.device, answer.evaluation)
        else:
            try:
                guard.admit(answer)
                rule.add(answer)
            except UpdateRejected as refusal:
                self.rejected[answer.device] = refusal.reason
                return
            self.weights[answer.device] = answer.weight
            self._metrics.add(answer.weight, answer.metrics)
            if TRAIN_LOSS in answer.metrics:
                self.losses[answer.device] = answer.metrics[TRAIN_LOSS]
            if self.plan.evaluate:
                self._add_evaluation(answer.device, answer.evaluation or NO_EVALUATION)

    def note(self) -> SumNote:
        measured = self.evaluated or self

        def of_contributors(found: dict[str, _T]) -> dict[str, _T]:  # a device may leave between two regional rounds
            return {device: one for device, one in found.items() if device in self.weights}

        return SumNote(
            weights=self.weights, failed=self.failed, rejected=self.rejected,
            metrics={name: list(pair) for name, pair in self._metrics.sums.items()},
            evaluations=of_contributors(measured.evaluations),
            evaluation_weights=of_contributors(measured.evaluation_weights),
            evaluation_faults=of_contributors(measured.evaluation_faults), losses=self.losses,
            regions=self._parts_of_regions(),
        )  # fmt: skip

    def _parts_of_regions(self) -> dict[str, RegionPart]:
        """Return which region has answered for which of this note's devices."""
        here = {*self.weights, *self.failed, *self.rejected}
        below = {device for one in self.regions.values() for device in (*one.admitted, *one.failures)}
        parts = dict(self.regions)
        if self.part is not None:
            name, own = self.part
            failures = {**self.failed, **self.rejected}
            parts[name] = dataclasses.replace(
                own, admitted=tuple(one for one in self.weights if one not in below),
                failures={one: why for one, why in failures.items() if one not in below},
            )  # fmt: skip
        return {
            name: RegionPart(
                parent=one.parent, admitted=[device for device in one.admitted if device in here],
                failures={device: why for device, why in one.failures.items() if device in here},
                seconds=one.seconds, up_bytes=one.up_bytes, down_bytes=one.down_bytes,
            )
            for name, one in parts.items()
        }  # fmt: skip

    def mean(self) -> Tree:
        """Return the weighted mean as it travels; empty without an update. That of a large model is read by blocks."""
        _, rule = self._parts()
        if not self.weights or not self.plan.fit:
            return {}
        if self.base is None:
            return rule.partial_mean().total
        first, last = self.base
        whole, spec = change(first, self.step(last)), partial_spec(spec_of(first), is_mean=True)
        return {name: array.astype(spec[name].dtype) for name, array in whole.items()}

    def step(self, parameters: Tree) -> Tree:
        """Return a region's parameters after this round, in their dtypes; ends the sum."""
        _, rule = self._parts()
        return regional_step(parameters, rule.result())

    def _parts(self) -> tuple[RoundGuard, Merging]:
        if self._guard is None or self._rule is None:
            rule = make_rule(self.rule_name, sent_part(self.plan.parameters, self.plan.train))
            if not isinstance(rule, Merging):
                raise ProtocolError(f"the rule {self.rule_name!r} does not merge partial sums")
            self._guard, self._rule = RoundGuard(self.plan, any_device=True), rule
        return self._guard, self._rule

    def _add_sum(self, partial: Partial) -> None:
        guard, rule = self._parts()
        if self.plan.fit:
            try:
                guard.admit_partial(partial)
                rule.merge(partial)
            except UpdateRejected as refusal:
                self.rejected |= dict.fromkeys(partial.contributors, refusal.reason)
                return
        self.weights |= partial.weights
        self.losses |= partial.losses
        for name, part in partial.regions.items():
            self.regions[name] = self.regions[name] + part if name in self.regions else part
        self._metrics.merge(partial.metrics)
        for device, one in partial.device_evaluations.items():
            self._add_evaluation(device, one)

    def _add_evaluation(self, device: str, evaluation: DeviceEvaluation) -> None:
        if evaluation.fault:
            self.evaluation_faults[device] = evaluation.fault
        else:
            self.evaluations[device] = dict(evaluation.metrics)
            self.evaluation_weights[device] = evaluation.weight


def wrong_kind(note: SumNote, assignment: Assignment) -> str:
    """Return why a sum is of another kind than its round; empty if it is of this kind."""
    if isinstance(assignment, Evaluate) and note.metrics:
        return "it has metrics of a training, and the round only evaluates"
    return ""
