"""Federated evaluation: what the devices measured of one set of parameters, as metrics over all of them.

    devices/NAME              mean over the devices, weighted by their numbers of evaluation samples
    devices/NAME/std          standard deviation over the devices, weighted alike
    devices/NAME/worst_tenth  mean over the worst tenth of the devices, at least one, by the metric's direction
    devices/count             number of devices

The worst tenth is that of Li et al. 2020 (q-FFL), each of its devices counted alike; without a known direction it is
left out. Invariant: sums are exactly rounded (math.fsum), so the result depends neither on the order of the devices
nor on how they were grouped. Memory: two numbers of 8 bytes for each metric and device.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence

from edgefl.aggregation.directions import direction_of_name
from edgefl.guards import COUNT, DEVICES, STD, WORST_TENTH, base_of, same_name, wrong_evaluation
from edgefl.records import DeviceEvaluation, Evaluations, EvaluationSpec

MAX_NAMES = 1000  # different metrics in a round, from all devices


class FederatedEvaluation:
    """Collects the evaluations of one round's devices. `faults` has the devices that do not count, and why."""

    def __init__(self, spec: EvaluationSpec) -> None:
        self._spec = spec
        self._values: dict[str, tuple[array[float], array[float]]] = {}  # see `Evaluations`
        self._count = 0
        self.faults: dict[str, str] = {}

    @property
    def count(self) -> int:
        """The number of devices whose evaluation counts."""
        return self._count

    def add(self, device: str, evaluation: DeviceEvaluation) -> None:
        """Take one device's evaluation, or note why it does not count."""
        if fault := wrong_evaluation(evaluation, self._spec) or self._too_many(evaluation.metrics):
            self.faults[device] = fault
            return
        for name, value in evaluation.metrics.items():
            self._extend(name, (value,), (evaluation.weight,))
        self._count += 1

    def merge(self, several: Evaluations) -> None:
        """Take the evaluations of several devices, which were checked by `add` there."""
        for name, (values, weights) in several.values.items():
            self._extend(name, values, weights)
        self._count += several.count
        self.faults |= several.faults

    def partial(self) -> Evaluations:
        """Return all evaluations so far, for the next tier."""
        return Evaluations(values=self._values, count=self._count, faults=self.faults)

    def metrics(self) -> dict[str, float]:
        """Return the metrics over all devices; none if no device evaluated."""
        if not self._count:
            return {}
        found: dict[str, float] = {DEVICES + COUNT: float(self._count)}
        for name in self._names():
            values, weights = self._values[name]
            found |= {DEVICES + suffix: value for suffix, value in self._of(name, values, weights).items()}
        return found

    def _of(self, name: str, values: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
        total = math.fsum(weights)
        mean = math.fsum(map(float.__mul__, weights, values)) / total
        spread = math.fsum(weight * (value - mean) ** 2 for value, weight in zip(values, weights, strict=True)) / total
        found = {name: mean, f"{name}/{STD}": math.sqrt(spread)}
        if (higher := direction_in(self._spec, name)) is not None:
            worst = sorted(values, reverse=not higher)[: max(1, len(values) // 10)]
            found[f"{name}/{WORST_TENTH}"] = math.fsum(worst) / len(worst)
        return found

    def _names(self) -> list[str]:
        """Return the names to report: declared ones first and in their order, then those of at least half the devices.

        Of a task whose own function names the metrics, a name that few devices send is left out: a single device
        cannot add metrics to a result.
        """
        known = list(self._spec.directions)
        if self._spec.declared:
            return sorted(self._values, key=lambda name: (known.index(base_of(name, known) or known[0]), name))
        return sorted(name for name, (values, _) in self._values.items() if 2 * len(values) >= self._count)

    def _extend(self, name: str, values: Sequence[float], weights: Sequence[float]) -> None:
        if name not in self._values:
            self._values[name] = (array("d"), array("d"))
        kept_values, kept_weights = self._values[name]
        kept_values.extend(values)
        kept_weights.extend(weights)

    def _too_many(self, metrics: Mapping[str, float]) -> str | None:
        """Say what is wrong with new names beside those of the other devices, if anything is."""
        if metrics.keys() <= self._values.keys():
            return None
        names = metrics.keys() | self._values.keys()
        if len(names) > MAX_NAMES:
            return f"evaluation: the devices of a round report {MAX_NAMES} different metrics at most; it adds others"
        return None if (fault := same_name(names)) is None else f"evaluation: {fault}"


def direction_in(spec: EvaluationSpec, name: str) -> bool | None:
    """Return whether a higher value of a metric is better; None if nothing says so."""
    known = spec.directions.get(base_of(name, spec.directions) or name)
    return direction_of_name(name) if known is None else known
