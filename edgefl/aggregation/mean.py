"""The weighted mean of updates: FedAvg's and FedSGD's rule (McMahan et al. 2017, Algorithm 1).

    result = sum_k weight_k * delta_k / sum_k weight_k

Accumulates in float64. Memory is one model, whatever the cohort's size; tiers of means give the flat mean.
Integers (such as counters in buffers) are rounded to the nearest; for booleans the weighted majority wins.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from edgefl.errors import StepFailed, UpdateRejected
from edgefl.guards import not_finite_tree, wrong_spec, wrong_weight
from edgefl.records import Partial, Update
from edgefl.trees import Array, TensorSpec, Tree, blocks, is_float, spec_of


class WeightedMean:
    """The weighted mean. It streams, and it merges partial sums of regions."""

    streams = True
    merges = True

    def __init__(self, like: Tree) -> None:
        self._spec = spec_of(like)
        self._totals = {name: np.zeros(_size(spec.shape)) for name, spec in self._spec.items()}
        self._weight = 0.0
        self._contributors: list[str] = []

    def add(self, update: Update) -> None:
        """Fold one admitted update. Its weight must be finite and above 0, which the guard ensures."""
        weight = np.float64(update.weight)  # a numpy scalar, so that products are float64
        for name, total in self._totals.items():
            delta = _signed(update.tree[name]).reshape(-1)
            for block in blocks(total.size):
                total[block] += weight * delta[block]
        self._weight += update.weight
        self._contributors.append(update.device)

    def merge(self, partial: Partial) -> None:
        """Fold a partial sum; raises UpdateRejected if a device is counted twice, or if the tensors do not match."""
        counted = Counter((*self._contributors, *partial.contributors))
        if twice := sorted(name for name, times in counted.items() if times > 1):
            raise UpdateRejected(twice[0], "it is already counted in another partial sum of this round")
        wanted = {name: TensorSpec(spec.shape, np.dtype(np.float64)) for name, spec in self._spec.items()}
        fault = (
            wrong_weight(partial.weight) or wrong_spec(spec_of(partial.total), wanted) or not_finite_tree(partial.total)
        )
        if fault:
            raise UpdateRejected(", ".join(partial.contributors), f"partial sum: {fault}")
        for name, total in self._totals.items():
            np.add(total, partial.total[name].reshape(-1), out=total)
        self._weight += partial.weight
        self._contributors.extend(partial.contributors)

    def partial(self) -> Partial:
        """Return the sum so far, for the next tier."""
        total = {name: total.reshape(self._spec[name].shape) for name, total in self._totals.items()}
        return Partial(total=total, weight=self._weight, contributors=tuple(self._contributors))

    def result(self) -> Tree:
        """Return the mean and end the rule: sums are freed one by one, so that memory stays one model.

        Needs at least one update, which the quorum ensures.
        """
        return {name: self._mean(name, self._totals.pop(name)) for name in self._spec}

    def _mean(self, name: str, total: Array) -> Array:
        spec = self._spec[name]
        mean = np.empty(total.size, spec.dtype)
        for block in blocks(total.size):
            value = total[block] / self._weight
            mean[block] = value if is_float(spec.dtype) else _whole(name, value).astype(spec.dtype)
        return mean.reshape(spec.shape)


def _whole(name: str, value: Array) -> Array:
    """Round to the nearest integer; raises StepFailed beyond 64 bits, where the result of a cast is undefined."""
    whole = np.rint(value)
    if not ((whole >= -(2.0**63)) & (whole < 2.0**63)).all():
        raise StepFailed(f"the mean of the updates of tensor {name!r} exceeds 64 bits: {np.abs(whole).max():g}")
    return whole.astype(np.int64)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _signed(delta: Array) -> Array:
    """Convert a wrapped difference of unsigned integers to the signed difference it represents."""
    return delta.view(delta.dtype.str.replace("u", "i")) if delta.dtype.kind == "u" else delta
