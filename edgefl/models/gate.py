"""The gate: what a compressed model is judged by, and how much of it may be lost.

The measure is one of the task's own metrics: the one that is asked for, else its first with a known direction, else
accuracy if the task is a classification, else its loss. A task is a classification if its test targets are class
indices: integers in 0..C-1, for outputs of C scores. What is lost of a metric that should be high is the difference.
Of one that should be low, it is a fraction of what the model has learned:

    drop = (r(after) - r(before)) / (r(blind) - r(before))

`blind` is the value for the source's mean output, which a model that ignores its input would return. r is the square
root for a squared error, so that errors have the targets' unit, and the identity otherwise.
The samples are read chunk by chunk, once for the source, once for the compressed file, and once more for `blind`.
Invariant: a number is called accuracy only if it is the task's own metric or the fraction of right answers; a set of
samples is never in memory as a whole, but for what the task itself loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgefl.errors import ConfigError, NotMeasurable
from edgefl.models.compress import Measure
from edgefl.models.dtypes import array_for_file
from edgefl.models.sample import BATCHES
from edgefl.models.session import input_name, open_session, run_errors
from edgefl.task import Task, UserCode
from edgefl.training.evaluation import EVALUATION_BATCH, evaluate_model
from edgefl.training.local import make_model
from edgefl.training.randomness import seeded
from edgefl.training.samples import Samples, SampleSet, test_samples
from edgefl.training.structures import INPUT, OUTPUT, Structure, argument_names, call, leaves, mapped, named, unnamed
from edgefl.trees import Array, Tree

if TYPE_CHECKING:
    import torch

ACCURACY, LOSS = "accuracy", "loss"
MAX_CALIBRATION = 256
CALIBRATION_SHARE = 5  # one sample in five calibrates, the others judge
_SEED = 0
_FEW = 2  # samples that show the form of the outputs


class ModelSession(Protocol):
    """A model that runs, as ONNX Runtime's sessions do: also one in several parts."""

    def get_inputs(self) -> list[Any]:
        """Return the inputs, each with its `name`."""

    def run(self, names: None, feeds: Mapping[str, Array], /) -> list[Array]:
        """Return all outputs, in the model's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """How ONNX files of one task are evaluated."""

    measure: Measure
    evaluate: Callable[[Path | ModelSession], Mapping[str, float]]  # all metrics, including the measure
    calibration: Tree  # inputs by name, (N, ...) each, that are not among those that `evaluate` uses


def gate_of(task: Task, source: Path, metric: str | None = None, *, relative: bool = False) -> Gate:
    """Return the gate for compressed forms of a file, by the metric that is named, or by the task's own choice.

    `relative`: what is lost is a fraction of the value before. Raises NotMeasurable if the cost of compression cannot
    be measured, ConfigError for a metric that the task does not have or whose direction is not known.
    """
    if task.model is None:
        raise NotMeasurable(
            f"task {task.name!r} exports its model itself, and only PyTorch models are compressed: let its export "
            "return a smaller one"
        )
    if task.test_data is None:
        raise NotMeasurable(f"task {task.name!r} has no test_data, so the cost of compression cannot be measured")
    calibration, samples = split(test_samples(task, {}))
    file = _File(task, samples)
    kept = file.feeds(open_session(source), calibration)
    seen = file.seen(source, samples)
    name = metric or _own_choice(task, is_classification=seen.accuracy is not None)
    if name == ACCURACY and ACCURACY not in task.metrics and seen.accuracy is not None:
        before = {**seen.metrics, ACCURACY: seen.accuracy}
        return Gate(
            measure=_relative(task, name, before[name], 1) if relative else Measure(),
            evaluate=lambda path: before if path == source else file.with_accuracy(path, samples),
            calibration=kept,
        )
    before = seen.metrics
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
        share = _share_lost(file, seen, samples, name)
        measure = Measure(name=name, drop=share, unit=" of what the model has learned")
    return Gate(
        measure=measure,
        evaluate=lambda path: before if path == source else file.seen(path, samples).metrics,
        calibration=kept,
    )


class OtherFile:
    """An ONNX file that was made elsewhere, and a task whose test data measure it.

    The file need not come from the task's model, but takes and returns what that does: of several inputs or outputs,
    each has the name that edgefl's own export gives it. Nothing is run before `measured`. Raises NotMeasurable for a
    task that cannot judge a file, ConfigError for a file with other inputs or outputs.
    """

    def __init__(self, task: Task, path: Path) -> None:
        if task.model is None or task.test_data is None:
            lacks = "model" if task.model is None else "test_data"
            raise NotMeasurable(
                f"task {task.name!r} has no {lacks}, so it cannot measure an ONNX file; publish the file without "
                "--task, and what you know of it with --metrics"
            )
        self._path, self._samples = path, test_samples(task, {})
        self._file = _File(task, self._samples)
        names = self._file.input_names_of(path)
        rows = [array_for_file(one) for one in leaves(self._samples.first(max(BATCHES)).inputs)]
        self.cases: list[Tree] = [  # for the release's sample
            {name: one[np.arange(batch) % len(one)] for name, one in zip(names, rows, strict=True)} for batch in BATCHES
        ]

    def measured(self) -> Mapping[str, float]:
        """Return the loss and the task's metrics on all its test data."""
        self._file.refuse_other_outputs(self._path, self._samples)
        return self._file.seen(self._path, self._samples).metrics


def split(samples: SampleSet) -> tuple[Samples, SampleSet]:
    """Return samples for calibration, in memory, and for the gate; both are all of fewer than ten.

    They are drawn by their positions, with a fixed seed.
    """
    import torch

    if len(samples) < 2 * CALIBRATION_SHARE:
        return samples.first(len(samples)), samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(_SEED)).to(samples.device)
    count = min(MAX_CALIBRATION, len(samples) // CALIBRATION_SHARE)
    first, rest = order[:count], order[count:].sort().values
    return samples.chosen(first).first(count), samples.chosen(rest)


def _relative(task: Task, name: str, before: float, sign: int) -> Measure:
    if before == 0:
        raise NotMeasurable(f"task {task.name!r}: {name} is 0 before compression: there is no fraction of it")
    return Measure(
        name=name, drop=lambda before, after: sign * (before - after) / abs(before), unit=f" of the {name} before"
    )


def _own_choice(task: Task, *, is_classification: bool) -> str:
    known = (name for name in task.metrics if task.direction_of(name) is not None)
    return next(known, ACCURACY if is_classification else LOSS)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What a file computes on all samples."""

    metrics: dict[str, float]  # the loss and the task's own
    accuracy: float | None  # the fraction of right answers; None = the targets are not classes
    means: list[Array] | None  # of each output, (1, ...), in its own dtype; None = their sizes differ between chunks


class _ChunkSums:
    """Gathers what `_Seen` has beside the metrics, chunk by chunk."""

    def __init__(self) -> None:
        self._are_classes = True
        self._right = self._answers = self._rows = 0
        self._sums: list[Any] | None = None  # float64, (1, ...)
        self._dtypes: list[Any] = []

    def add(self, outputs: Sequence[Array], targets: Structure) -> None:
        """Take a chunk into account: a file's outputs in order, and its targets."""
        sums = [one.sum(axis=0, keepdims=True, dtype=np.float64) for one in outputs]
        if not self._rows:
            self._sums = sums
            self._dtypes = [one.dtype if one.dtype.kind == "f" else np.dtype(np.float32) for one in outputs]
        elif self._sums is not None:
            are_alike = all(one.shape == other.shape for one, other in zip(self._sums, sums, strict=True))
            self._sums = [one + other for one, other in zip(self._sums, sums, strict=True)] if are_alike else None
        self._rows += len(outputs[0])
        if not self._are_classes:
            return
        wanted = leaves(targets)
        self._are_classes = len(outputs) == len(wanted) == 1 and is_classified(outputs[0], array_for_file(wanted[0]))
        if self._are_classes:
            answers = array_for_file(wanted[0])
            self._right += int((outputs[0].argmax(axis=1) == answers).sum())
            self._answers += answers.size

    @property
    def accuracy(self) -> float | None:
        """As in `_Seen`."""
        return self._right / self._answers if self._are_classes and self._answers else None

    @property
    def means(self) -> list[Array] | None:
        """As in `_Seen`."""
        if self._sums is None:
            return None
        return [np.asarray(one / self._rows, dtype) for one, dtype in zip(self._sums, self._dtypes, strict=True)]


class _File:
    """How ONNX files of one task are run on its samples."""

    def __init__(self, task: Task, samples: SampleSet) -> None:
        import torch

        self.task = task
        few = samples.first(_FEW).inputs
        model = make_model(task).eval()
        with torch.no_grad(), seeded(0), UserCode(task.name, "the model"):
            outputs = call(model, few)
        self.form = mapped(lambda _: 0, outputs)  # of the outputs; 0 = one tensor
        self._inputs = list(named(few, INPUT, argument_names(model, few)))
        self._outputs = {name: list(one.shape) for name, one in named(outputs, OUTPUT).items()}

    def input_names_of(self, path: Path) -> list[str]:
        """Read a file's inputs, in order, without running it; raises ConfigError unless they are the task's."""
        import onnx
        from google.protobuf.message import DecodeError

        try:
            graph = onnx.load(path, load_external_data=False).graph
        except DecodeError as cause:
            raise ConfigError(f"{path.name} is not an ONNX file: {cause}") from cause
        constants = {one.name for one in graph.initializer}
        names = [one.name for one in graph.input if one.name not in constants]
        self._refuse_others(path, "inputs", names, self._inputs)
        self._refuse_others(path, "outputs", [one.name for one in graph.output], list(self._outputs))
        return names

    def _refuse_others(self, path: Path, what: str, names: list[str], known: list[str]) -> None:
        if names != known and not len(names) == len(known) == 1:  # a single one may have any name
            raise ConfigError(
                f"{path.name} has the {what} {', '.join(names)}; task {self.task.name!r} can measure a file with "
                f"{', '.join(known)}, in this order"
            )

    def refuse_other_outputs(self, path: Path, samples: SampleSet) -> None:
        """Raise ConfigError unless a file returns outputs of the shapes that the task's model returns."""
        try:
            found = open_session(path).run(None, self.feeds(open_session(path), samples.first(_FEW)))
        except run_errors() as cause:
            raise ConfigError(f"{path.name} does not run on test data of task {self.task.name!r}: {cause}") from cause
        for array, (name, shape) in zip(found, self._outputs.items(), strict=True):
            if (seen := list(np.shape(array))) != shape:
                raise ConfigError(
                    f"{path.name} returns {seen} where the model of task {self.task.name!r} returns {shape} ({name}), "
                    "so its metrics would mean something else. Publish it without --task, with your own --metrics"
                )

    def feeds(self, session: Any, samples: Samples) -> dict[str, Array]:
        """Return samples' inputs by the names that a file has for them."""
        names = [node.name for node in session.get_inputs()]
        arrays = [array_for_file(one) for one in leaves(samples.inputs)]
        if len(names) != len(arrays):
            raise ConfigError(f"the file has the inputs {', '.join(names)}; the task has {len(arrays)}")
        return dict(zip(names, arrays, strict=True))

    def seen(self, model: Path | ModelSession, samples: SampleSet) -> _Seen:
        """Run a file, or a model that is open, on these samples, in one pass over them."""
        session, sums = open_session(model) if isinstance(model, Path) else model, _ChunkSums()
        last: list[Array] = []  # a chunk's outputs, as the file returns them

        def run(inputs: Structure) -> list[Array]:
            last[:] = session.run(None, self.feeds(session, Samples(inputs, inputs)))
            return last

        metrics = self.evaluated(run, samples, lambda _outputs, targets: sums.add(last, targets))
        return _Seen(metrics=metrics, accuracy=sums.accuracy if self.form == 0 else None, means=sums.means)

    def with_accuracy(self, model: Path | ModelSession, samples: SampleSet) -> dict[str, float]:
        """Return the loss, the task's metrics and the accuracy of a file whose targets are classes."""
        seen = self.seen(model, samples)
        if seen.accuracy is None:
            who = model.name if isinstance(model, Path) else "the model"
            raise ConfigError(f"{who} returns no scores of classes any more, so it has no accuracy")
        return {**seen.metrics, ACCURACY: seen.accuracy}

    def evaluated(
        self, run: Callable[[Structure], list[Array]], samples: SampleSet,
        watch: Callable[[Structure, Structure], object] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Return the loss and the task's metrics of a function from inputs to the outputs' arrays."""
        return evaluate_model(self.task, _answering(run, self.form), samples, watch=watch)


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


def _share_lost(file: _File, seen: _Seen, samples: SampleSet, name: str) -> Callable[[float, float], float]:
    task, means, before = file.task, seen.means, seen.metrics[name]
    if means is None:
        raise NotMeasurable(
            f"task {task.name!r}: its outputs have other sizes in each batch, so there is no mean output to compare "
            f"its {name} with. Judge by a metric of which more is better, or by a share of it, such as --max-drop 1%"
        )

    def ignoring(inputs: Structure) -> list[Array]:
        return [np.repeat(mean, len(leaves(inputs)[0]), axis=0) for mean in means]

    blind = file.evaluated(ignoring, samples)[name]
    if not before < blind:  # also if it is NaN
        raise NotMeasurable(
            f"task {task.name!r}: its {name} on the test data is {before:.4g}, and {blind:.4g} for a model that "
            "ignores its input. It has learned nothing yet that compression could lose: train it"
        )
    root = math.sqrt if file.form == 0 and _is_squared(file, means[0], samples, name) else float
    return lambda before, after: (root(after) - root(before)) / (root(blind) - root(before))


def _is_squared(file: _File, mean: Array, samples: SampleSet, name: str) -> bool:
    """Whether a measure is a squared error: half the distance from the targets gives a quarter of it."""
    import torch

    few = next(samples.chunks(EVALUATION_BATCH))
    targets = few.targets
    if not isinstance(targets, torch.Tensor) or not targets.is_floating_point():
        return False
    if targets.shape[1:] != mean.shape[1:]:
        return False
    far = torch.from_numpy(mean).to(targets) - targets

    def at(share: float) -> float:
        return file.evaluated(lambda _inputs: [array_for_file(targets + share * far)], few)[name]

    return math.isclose(at(0.5), at(1.0) / 4, rel_tol=1e-3)


def _answering(run: Callable[[Structure], list[Array]], form: Structure) -> torch.nn.Module:
    """Wrap a function from inputs to the arrays of its outputs as a torch module with outputs of this form."""
    import torch

    class Answering(torch.nn.Module):
        def forward(self, inputs: Structure, /) -> Structure:
            device = leaves(inputs)[0].device
            tensors = [torch.from_numpy(np.asarray(one)).to(device) for one in run(inputs)]
            names = list(named(form, OUTPUT))
            if len(names) != len(tensors):
                raise ConfigError(f"the file has {len(tensors)} outputs, and the task's model {len(names)}")
            return unnamed(dict(zip(names, tensors, strict=True)), form, OUTPUT)

    return Answering()


def _has_scores(outputs: Array, targets: Array) -> bool:
    """Whether outputs have at least two scores for each integer in the targets."""
    if targets.dtype.kind not in "iu" or outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    return targets.shape == (len(outputs), *outputs.shape[2:])
