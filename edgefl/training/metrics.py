"""A task's metrics, each exact over the whole set that is evaluated, and their directions.

A metric is one of:
- a function of (outputs, targets) that returns a mean over samples. It is evaluated batch by batch and the values are
  averaged by the batches' sizes. This is exact for a mean only, so some samples are also evaluated in pairs: a
  function whose values for the pairs do not average to that for all is refused, instead of reporting a number that
  looks right.
- an object with `update(outputs, targets)`, `compute()` and `reset()`, as in torchmetrics. It sees every batch and
  computes once, so R2, F1, AUC, RMSE or a confusion matrix are those of the whole set. `WholeSet(function)` makes one
  of a function of all outputs and all targets, which are kept in memory until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from edgefl.aggregation.directions import direction_of_name
from edgefl.errors import ConfigError, TaskError
from edgefl.training.structures import OUTPUT, TARGET, Structure, described, leaves, mapped, rows

if TYPE_CHECKING:
    Metric: TypeAlias = "Callable[[Structure, Structure], Any] | StreamingMetric"

MAX_COMPARED = 16  # samples for which a function is checked to be a mean
MAX_NUMBERS = 100  # of one metric, such as a confusion matrix
LOSS = "loss"
_REL_TOLERANCE, _ABS_TOLERANCE = 1e-3, 1e-5  # sums in float32 differ


@runtime_checkable
class StreamingMetric(Protocol):
    """A metric that sees all batches; torchmetrics' interface (https://lightning.ai/docs/torchmetrics)."""

    def update(self, outputs: Any, targets: Any, /) -> object:
        """Take one batch into account."""

    def compute(self) -> Any:
        """Return the value over all batches since `reset`: a number, an array or a mapping of them."""

    def reset(self) -> object:
        """Forget all batches."""


class WholeSet:
    """A streaming metric of a function of all outputs and targets, structures of tensors (N, ...).

    `WholeSet(lambda outputs, targets: ((outputs - targets) ** 2).mean().sqrt(), higher_is_better=False)`
    """

    def __init__(self, function: Callable[[Any, Any], Any], *, higher_is_better: bool | None = None) -> None:
        self.higher_is_better = higher_is_better
        self._function = function
        self.reset()

    def update(self, outputs: Structure, targets: Structure, /) -> None:
        """Keep one batch."""
        self._batches.append((outputs, targets))

    def compute(self) -> Any:
        """Return the function's value for all batches together; raises TaskError if they do not fit together."""
        outputs, targets = (_joined(part, name) for part, name in zip(zip(*self._batches, strict=True),
                                                                      (OUTPUT, TARGET), strict=True))  # fmt: skip
        return self._function(outputs, targets)

    def reset(self) -> None:
        """Drop the batches."""
        self._batches: list[tuple[Structure, Structure]] = []


def _joined(batches: Sequence[Structure], base: str) -> Structure:
    """Return the batches one after another."""
    import torch

    first, *others = batches
    try:
        return mapped(lambda *parts: torch.cat(parts), first, *others)
    except (RuntimeError, ValueError, TypeError) as cause:
        shapes = "; ".join(dict.fromkeys(described(one, base) for one in batches))
        raise TaskError(
            f"WholeSet needs all {base}s in one tensor, and the batches do not fit together: {shapes:.500}. Give an "
            "object with update, compute and reset instead"
        ) from cause


def direction(name: str, metric: object) -> bool | None:
    """Return whether higher is better: by the metric's attribute `higher_is_better`, else its name; None = unknown."""
    if isinstance(said := getattr(metric, "higher_is_better", None), bool):
        return said
    return direction_of_name(name)


def refuse_metrics(task: str, metrics: Mapping[str, object]) -> None:
    """Raise ConfigError for what cannot be a metric of a task."""
    for name, metric in metrics.items():
        found = [part for part in ("update", "compute", "reset") if callable(getattr(metric, part, None))]
        if not callable(metric) and len(found) < 3:
            raise ConfigError(
                f"task {task!r}: metric {name!r} is a {type(metric).__name__} with {', '.join(found) or 'none'} of "
                "update, compute and reset; expected these three, or a function of (outputs, targets)"
            )
    if LOSS in metrics:
        raise ConfigError(f"task {task!r}: a metric is named 'loss', the name under which the loss itself is reported")


class Evaluation:
    """The loss and a task's metrics over a set, batch by batch."""

    def __init__(self, task: str, metrics: Mapping[str, Metric]) -> None:
        self._task, self._metrics = task, metrics
        self._means: dict[str, Callable[[Any, Any], Any]] = {}
        self._streaming: dict[str, StreamingMetric] = {}
        for name, metric in metrics.items():
            if isinstance(metric, StreamingMetric):
                self._streaming[name] = metric
            else:
                self._means[name] = metric
        self._totals = dict.fromkeys((LOSS, *self._means), 0.0)
        self._count = 0
        for metric in self._streaming.values():
            metric.reset()

    def add(self, outputs: Any, targets: Any, loss: float, count: int) -> None:
        """Take one batch of `count` samples into account; raises TaskError for a function that is not a mean."""
        values = {LOSS: loss} | {name: _number(self._task, name, of(outputs, targets)) for name, of in
                                 self._means.items()}  # fmt: skip
        if not self._count:
            self._refuse_no_means(outputs, targets, count)
        self._count += count
        for name, value in values.items():
            self._totals[name] += value * count
        for metric in self._streaming.values():
            metric.update(outputs, targets)

    def result(self) -> dict[str, float]:
        """Return `loss` and each metric over all batches."""
        means = {name: total / self._count for name, total in self._totals.items()}
        for name, metric in self._streaming.items():
            try:
                found = numbers(self._task, name, metric.compute())
                if twice := sorted(found.keys() & means.keys()):
                    raise TaskError(f"task {self._task!r}: two metrics return the number {twice[0]!r}; rename one")
                means |= found
            finally:
                metric.reset()  # what it kept is freed
        return {name: means[name] for name in _ordered(means, self._metrics)}

    def _refuse_no_means(self, outputs: Any, targets: Any, count: int) -> None:
        """Compare each function's value for a few samples with the mean of its values for pairs of them."""
        few = min(count, MAX_COMPARED) // 2 * 2
        if few <= 2 or not all(_has_rows(one, count) for part in (outputs, targets) for one in leaves(part)):
            return
        for name, metric in self._means.items():
            whole, *pairs = (
                _number(self._task, name, metric(*(rows(part, which) for part in (outputs, targets))))
                for which in (slice(0, few), *(slice(n, n + 2) for n in range(0, few, 2)))
            )
            mean = sum(pairs) / len(pairs)
            if not math.isfinite(whole) or math.isclose(mean, whole, rel_tol=_REL_TOLERANCE, abs_tol=_ABS_TOLERANCE):
                continue
            raise TaskError(
                f"task {self._task!r}: metric {name!r} is not a mean over samples: it is {whole:.4g} for {few} "
                f"samples, but {mean:.4g} on average for pairs of them. Give an object with update, compute and reset, "
                "such as one of torchmetrics, or edgefl.WholeSet(function)"
            )


def _has_rows(leaf: Any, count: int) -> bool:
    return bool(getattr(leaf, "ndim", 0)) and len(leaf) == count


def numbers(task: str, name: str, value: Any) -> dict[str, float]:
    """Return a metric's numbers by name: `name`, or `name/key` and `name/i/j` for a mapping and an array."""
    found = dict(_flattened(name, value))
    if not 0 < len(found) <= MAX_NUMBERS:
        raise TaskError(
            f"task {task!r}: metric {name!r} returned {len(found)} numbers; expected at least one and at most "
            f"{MAX_NUMBERS}"
        )
    return {key: _number(task, key, one) for key, one in found.items()}


def _flattened(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flattened(f"{name}/{key}", one)
    elif isinstance(value, (list, tuple)) or getattr(value, "ndim", None):
        for index, one in enumerate(value):
            yield from _flattened(f"{name}/{index}", one)
    else:
        yield name, value


def _number(task: str, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as cause:
        seen = f"shape {list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
        raise TaskError(f"task {task!r}: metric {name!r} returned {seen}; expected one number") from cause


def _ordered(names: Mapping[str, float], metrics: Mapping[str, object]) -> Iterator[str]:
    """Yield the loss first, then the metrics in the task's order."""
    yield LOSS
    for metric in metrics:
        yield from (name for name in names if name == metric or name.startswith(f"{metric}/"))
