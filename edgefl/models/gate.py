"""The gate: what a compressed model is judged by, and how much of it may be lost.

The measure is one of the task's own metrics: the one that is asked for, else its first with a known direction, else
accuracy if the task is a classification, else its loss. A task is a classification if its test targets are class
indices: integers in 0..C-1, for outputs of C scores. What is lost of a metric that should be high is the difference.
Of one that should be low, it is a fraction of what the model has learned:

    drop = (r(after) - r(before)) / (r(blind) - r(before))

`blind` is the value for the source's mean output, which a model that ignores its input would return. r is the square
root for a squared error, so that errors have the targets' unit, and the identity otherwise.
Invariant: a number is called accuracy only if it is the task's own metric or the fraction of right answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgefl.errors import ConfigError, NotMeasurable
from edgefl.models.compress import Measure
from edgefl.models.session import input_name, open_session
from edgefl.task import Task
from edgefl.training.evaluation import EVALUATION_BATCH, evaluate_model
from edgefl.training.samples import Samples, test_samples
from edgefl.trees import Array

if TYPE_CHECKING:
    import torch

ACCURACY, LOSS = "accuracy", "loss"
MAX_CALIBRATION = 256
CALIBRATION_SHARE = 5  # one sample in five calibrates, the others judge
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """How ONNX files of one task are evaluated."""

    measure: Measure
    evaluate: Callable[[Path], Mapping[str, float]]  # all metrics of a file, including the measure
    calibration: Array  # inputs that are not among those that `evaluate` uses


def gate_of(task: Task, source: Path, metric: str | None = None, *, relative: bool = False) -> Gate:
    """Return the gate for compressed forms of a file, by the metric that is named, or by the task's own choice.

    `relative`: what is lost is a fraction of the value before. Raises NotMeasurable if the cost of compression cannot
    be measured, ConfigError for a metric that the task does not have or whose direction is not known.
    """
    if task.test_data is None:
        raise NotMeasurable(f"task {task.name!r} has no test_data, so the cost of compression cannot be measured")
    held_out = test_samples(task, {})
    calibration, samples = split(held_out.first(len(held_out)))
    kept = calibration.inputs.cpu().numpy()
    is_classification = all(is_classified(outputs, targets) for outputs, targets in _outputs(source, samples))
    name = metric or _own_choice(task, is_classification=is_classification)
    if name == ACCURACY and ACCURACY not in task.metrics and is_classification:
        inputs, targets = samples.inputs.cpu().numpy(), samples.targets.cpu().numpy()
        return Gate(
            measure=_relative(task, name, accuracy_of(source, inputs, targets), 1) if relative else Measure(),
            evaluate=lambda path: {**measured(task, path, samples), ACCURACY: accuracy_of(path, inputs, targets)},
            calibration=kept,
        )
    before = measured(task, source, samples)
    if name not in before:
        raise ConfigError(f"task {task.name!r} has no metric {name!r} to judge by; it has {', '.join(before)}")
    if (higher := task.direction_of(name)) is None:
        raise ConfigError(
            f"task {task.name!r}: whether a higher {name} is better is not known. Say it in the task: "
            f"higher_is_better={{{name!r}: True}}, or judge by another metric"
        )
    if not math.isfinite(before[name]):
        raise NotMeasurable(f"task {task.name!r}: {name} is {before[name]} before compression")
    measure = Measure(name=name)
    if relative:
        measure = _relative(task, name, before[name], 1 if higher else -1)
    elif not higher:
        share = _share_lost(task, source, samples, name, before[name])
        measure = Measure(name=name, drop=share, unit=" of what the model has learned")
    return Gate(measure=measure, evaluate=lambda path: measured(task, path, samples), calibration=kept)


def split(samples: Samples) -> tuple[Samples, Samples]:
    """Return samples for calibration and for the gate, drawn with a fixed seed; both are all of fewer than ten."""
    import torch

    if len(samples) < 2 * CALIBRATION_SHARE:
        return samples, samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(_SEED)).to(samples.device)
    count = min(MAX_CALIBRATION, len(samples) // CALIBRATION_SHARE)
    first, rest = order[:count], order[count:].sort().values
    return samples.chosen(first), samples.chosen(rest)


def _relative(task: Task, name: str, before: float, sign: int) -> Measure:
    if before == 0:
        raise NotMeasurable(f"task {task.name!r}: {name} is 0 before compression: there is no fraction of it")
    return Measure(
        name=name, drop=lambda before, after: sign * (before - after) / abs(before), unit=f" of the {name} before"
    )


def _own_choice(task: Task, *, is_classification: bool) -> str:
    known = (name for name in task.metrics if task.direction_of(name) is not None)
    return next(known, ACCURACY if is_classification else LOSS)


def measured(task: Task, path: Path, samples: Samples) -> dict[str, float]:
    """Return the loss and the task's metrics of an ONNX file on these samples."""
    return evaluate_model(task, _answering(_runner(path)), samples)


def is_classified(outputs: Array, targets: Array) -> bool:
    """Whether targets are classes for outputs of shape (N, C, ...): integers in 0..C-1, of shape (N, ...)."""
    return _has_scores(outputs, targets) and bool(((targets >= 0) & (targets < outputs.shape[1])).all())


def accuracy_of(path: Path, inputs: Array, targets: Array) -> float:
    """Return the fraction of targets that are the index of the largest output; for images, over all pixels.

    Raises ConfigError if the targets are not classes.
    """
    if len(inputs) == 0 or len(inputs) != len(targets):
        raise ConfigError(f"accuracy needs as many targets as inputs, at least one: got {len(inputs)}, {len(targets)}")
    session = open_session(path)
    name, right = input_name(session), 0
    for start in range(0, len(inputs), EVALUATION_BATCH):
        (outputs,) = session.run(None, {name: np.asarray(inputs[start : start + EVALUATION_BATCH])})
        chunk = np.asarray(targets[start : start + EVALUATION_BATCH])
        if not _has_scores(outputs, chunk):
            raise ConfigError(
                f"{path.name} returns {outputs.dtype}{list(outputs.shape)} for targets of {chunk.dtype}"
                f"{list(chunk.shape)}: these are not classes, so there is no accuracy"
            )
        right += int((outputs.argmax(axis=1) == chunk).sum())
    return right / np.asarray(targets).size


def _share_lost(
    task: Task, source: Path, samples: Samples, name: str, before: float
) -> Callable[[float, float], float]:
    mean = _mean_output(source, samples)
    blind = evaluate_model(task, _answering(lambda inputs: np.repeat(mean, len(inputs), axis=0)), samples)[name]
    if not before < blind:  # also if it is NaN
        raise NotMeasurable(
            f"task {task.name!r}: its {name} on the test data is {before:.4g}, and {blind:.4g} for a model that "
            "ignores its input. It has learned nothing yet that compression could lose: train it"
        )
    root = math.sqrt if _is_squared(task, mean, samples, name) else float
    return lambda before, after: (root(after) - root(before)) / (root(blind) - root(before))


def _is_squared(task: Task, mean: Array, samples: Samples, name: str) -> bool:
    """Whether a measure is a squared error: half the distance from the targets gives a quarter of it."""
    import torch

    targets = samples.targets[:EVALUATION_BATCH]
    if not targets.is_floating_point() or targets.shape[1:] != mean.shape[1:]:
        return False
    few = Samples(samples.inputs[:EVALUATION_BATCH], targets)
    far = torch.from_numpy(mean).to(targets) - targets

    def at(share: float) -> float:
        return evaluate_model(task, _answering(lambda _inputs: (targets + share * far).numpy()), few)[name]

    return math.isclose(at(0.5), at(1.0) / 4, rel_tol=1e-3)


def _mean_output(source: Path, samples: Samples) -> Array:
    """Return the mean of a file's outputs, (1, ...)."""
    total: Array | float = 0.0
    for outputs, _ in _outputs(source, samples):
        total = total + outputs.sum(axis=0, keepdims=True, dtype=np.float64)
    return np.asarray(total / len(samples), np.float32)


def _outputs(path: Path, samples: Samples) -> Iterator[tuple[Array, Array]]:
    run = _runner(path)
    for chunk in samples.chunks(EVALUATION_BATCH):
        yield run(chunk.inputs.cpu().numpy()), chunk.targets.cpu().numpy()


def _runner(path: Path) -> Callable[[Array], Array]:
    session = open_session(path)
    name = input_name(session)

    def run(inputs: Array) -> Array:
        outputs = session.run(None, {name: inputs})
        if len(outputs) != 1:
            raise ConfigError(f"{path.name} has {len(outputs)} outputs; a gate needs a model with one")
        return np.asarray(outputs[0])

    return run


def _answering(run: Callable[[Array], Array]) -> torch.nn.Module:
    """Wrap a function of arrays as a torch module."""
    import torch

    class Answering(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(run(inputs.cpu().numpy())).to(inputs.device)

    return Answering()


def _has_scores(outputs: Array, targets: Array) -> bool:
    """Whether outputs have at least two scores for each integer in the targets."""
    if targets.dtype.kind not in "iu" or outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    return targets.shape == (len(outputs), *outputs.shape[2:])
