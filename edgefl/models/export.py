"""Export PyTorch to ONNX; the file is kept only if it computes the same as the model.

The graph has one input for each tensor of the inputs, and one output for each of the outputs, named as
`edgefl.training.structures` names them: "input" and "output" where there is one. Each has a free batch dimension, and
further free dimensions if the task declares them (`edgefl.models.dynamic`). Tracing with one sample silently fixes the
batch size of some models, so at least two are traced. Types: `edgefl.models.dtypes`.
Invariant: the target file exists only if it agreed with the model at batch sizes 1, 2 and 3, and at another size of
each dynamic dimension.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import MissingExtra, ParityError, TaskError
from edgefl.models.dtypes import (
    array_for_file,
    computable,
    computable_tensor,
    is_in_bfloat16,
    keep_bfloat16,
    other_floats,
    tolerance_of,
)  # fmt: skip
from edgefl.models.dynamic import Dimension, dimensions_of, resized, torch_shapes
from edgefl.models.own_export import export_own
from edgefl.models.packing import refuse_too_large
from edgefl.models.sample import BATCHES
from edgefl.models.session import new_session, run_errors
from edgefl.task import Task, UserCode
from edgefl.terminal.user_code import place_of, quoted
from edgefl.training.adapters import adapters_of, without_adapters
from edgefl.training.local import make_model
from edgefl.training.quiet import quiet_tracing
from edgefl.training.samples import require_torch, test_samples, train_samples
from edgefl.training.structures import INPUT, OUTPUT, Structure, argument_names, call, mapped, named, unnamed
from edgefl.trees import Array, Tree

if TYPE_CHECKING:
    import torch

PARITY_BATCHES = (1, 2, 3)
Tensors = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class _Source:
    """A model to export, and the form of its inputs."""

    model: torch.nn.Module
    form: Structure  # of the inputs, without tensors
    names: tuple[str, ...]  # of the parameters of `forward` that get the parts of a tuple

    def outputs(self, inputs: Tensors, doing: str) -> dict[str, torch.Tensor]:
        """Return the model's outputs by name; raises TaskError if the model does, ParityError for other outputs."""
        import torch

        with torch.no_grad(), UserCode(type(self.model).__name__, doing):
            outputs = call(self.model, unnamed(inputs, self.form, INPUT, self.names))
        found = named(outputs, OUTPUT)
        if strange := {name: one for name, one in found.items() if not isinstance(one, torch.Tensor)}:
            told = ", ".join(f"{name} is a {type(one).__name__}" for name, one in strange.items())
            raise ParityError(f"the model returns other than tensors: {told}; expected tensors, tuples and dicts")
        return found


def export_task(task: Task, parameters: Tree, path: Path) -> list[Tree]:
    """Export the task's model with these parameters; the example inputs come from its test or training data.

    A task with its own `fit` makes the file itself, see `edgefl.models.own_export`.

    Returns inputs for the release's sample: by name, in batches of `edgefl.models.sample.BATCHES`.
    Raises TaskError if there is no model or data, ParityError if the export computes something else.
    """
    if task.model is None:
        return export_own(task, parameters, path)
    model = make_model(task, parameters)
    model = without_adapters(model, adapters_of(task.name, model))  # what they learnt is in the base's weights
    samples = test_samples(task, {}) if task.test_data is not None else train_samples(task, {})
    examples = samples.first(max(PARITY_BATCHES)).inputs
    return export_onnx(model, examples, path, dynamic=task.dynamic)


def export_onnx(
    model: torch.nn.Module, example_inputs: Structure, path: Path, *, dynamic: Any | None = None
) -> list[Tree]:
    """Export a model in evaluation mode into one file; returns inputs for its sample, as `export_task` does.

    `dynamic` is as in `Task.dynamic`. Raises ParityError if the exported graph computes something else; then no file
    is left. Raises ConfigError for a model of 2 GiB or more, which no ONNX file can hold.
    """
    require_torch("export to ONNX")
    tensors = (*model.parameters(), *model.buffers())
    refuse_too_large(type(model).__name__, sum(one.numel() * one.element_size() for one in tensors))
    evaluated = copy.deepcopy(model).cpu().eval()  # the caller's model keeps its mode and device
    names = argument_names(evaluated, example_inputs)
    inputs = {name: one.detach().cpu() for name, one in named(example_inputs, INPUT, names).items()}
    source = _Source(evaluated, mapped(lambda _: 0, example_inputs), names)
    example = _batch(inputs, max(2, *(len(one) for one in inputs.values())))
    source.outputs(example, "the model")  # an error of its own is told as it is, and not as the exporter meets it
    dimensions = dimensions_of(dynamic or {}, inputs)
    others = {one: _other_size(source, example, one) for one in dimensions}
    half = path.with_name(f".{path.name}.half")
    try:
        _trace(source, _traceable(example, others), half, dimensions)
        if is_in_bfloat16(evaluated):
            keep_bfloat16(half)
        check_parity(evaluated, half, example_inputs)
        for dimension, other in others.items():
            _check_dimension(source, half, dimension, other)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return [_feeds(_batch(inputs, batch)) for batch in BATCHES]


def check_parity(model: torch.nn.Module, path: Path, example: Structure) -> None:
    """Raise ParityError unless the file computes the same as the model, at batch sizes 1, 2 and 3."""
    names = argument_names(model, example)
    source = _Source(model, mapped(lambda _: 0, example), names)
    session, inputs = _open(path, model), named(example, INPUT, names)
    for batch in PARITY_BATCHES:
        _compare(source, session, _batch(inputs, batch), f"batch {batch}")


def _open(path: Path, model: torch.nn.Module) -> Any:
    try:
        return new_session(path, threads=1)
    except run_errors() as cause:
        advice = f" Keep the model in float32 instead of {types}" if (types := other_floats(model)) else ""
        raise ParityError(f"ONNX Runtime cannot run the exported model: {str(cause)[:1000]}.{advice}") from cause


def _check_dimension(source: _Source, path: Path, dimension: Dimension, other: Tensors) -> None:
    name, axis = dimension.axes[0]
    size = other[name].shape[axis]
    try:
        _compare(source, _open(path, source.model), other, f"size {size} instead of {dimension.size}")
    except ParityError as cause:
        raise ParityError(
            f"{dimension} is declared dynamic, but the exporter froze it: {cause}. The model's code uses this size as "
            "a plain number (in range, int() or a list, or in a constant of that size): compute with tensors and "
            "x.shape there, or leave it out of the task's `dynamic`"
        ) from cause


def _compare(source: _Source, session: Any, inputs: Tensors, where: str) -> None:
    wanted = source.outputs(inputs, f"the model at {where}")
    seen = _run(session, _feeds(inputs), list(wanted), where)
    for name, tensor in wanted.items():
        _compare_output(name, array_for_file(tensor), seen[name], where, tolerance_of(source.model))


def _compare_output(name: str, wanted: Array, seen: Array, where: str, tolerance: float) -> None:
    what = "" if name == OUTPUT else f" {name!r}"
    if seen.shape != wanted.shape or seen.dtype != wanted.dtype:
        raise ParityError(
            f"at {where} the exported model returns{what} {seen.dtype}{list(seen.shape)}, its source "
            f"{wanted.dtype}{list(wanted.shape)}"
        )
    difference = float(np.abs(seen.astype(np.float64) - wanted).max(initial=0.0))
    allowed = tolerance * max(1.0, float(np.abs(wanted.astype(np.float64)).max(initial=0.0)))
    if not difference <= allowed:  # also if it is NaN
        raise ParityError(
            f"at {where} the exported model differs from its source by {difference:.3g}"
            f"{f' in output {name!r}' if what else ''}, allowed: {allowed:.3g}"
        )


def _run(session: Any, feeds: Tree, names: Sequence[str], where: str) -> dict[str, Array]:
    try:
        return dict(zip(names, map(np.asarray, session.run(names, dict(feeds))), strict=True))
    except run_errors() as cause:
        raise ParityError(f"at {where} the exported model does not run: {cause}") from cause


def _feeds(inputs: Tensors) -> dict[str, Array]:
    return {name: array_for_file(one) for name, one in inputs.items()}


def _batch(inputs: Tensors, size: int) -> dict[str, torch.Tensor]:
    """Return `size` samples, repeating the given ones if there are fewer."""
    import torch

    if any(len(one) == 0 for one in inputs.values()):
        raise TaskError("an export needs at least one example input, got 0")
    return {name: one[torch.arange(size) % len(one)] for name, one in inputs.items()}


def _other_size(source: _Source, example: Tensors, dimension: Dimension) -> dict[str, torch.Tensor]:
    """Return the example at another size of a dimension; raises TaskError if the source accepts none."""
    first: TaskError | None = None
    for size in dimension.other_sizes():
        other = resized(example, dimension, size)
        try:
            source.outputs(other, f"the model at size {size} of {dimension}")
        except TaskError as error:
            first = first or error
        else:
            return other
    raise TaskError(
        f"{dimension} is declared dynamic, but the model itself runs at size {dimension.size} only: {first}. Leave it "
        "out of the task's `dynamic`, or give names to the dimensions that change together"
    ) from first


def _traceable(example: Tensors, others: Mapping[Dimension, Tensors]) -> Tensors:
    """Return the example without dynamic dimensions of size 1, which the exporter would take as constants."""
    for dimension, other in others.items():
        if dimension.size == 1:
            name, axis = dimension.axes[0]
            example = resized(example, dimension, other[name].shape[axis])
    return example


def _trace(source: _Source, example: Tensors, path: Path, dimensions: Sequence[Dimension]) -> None:
    import torch

    outputs = list(source.outputs(example, "the model"))
    if both := sorted(set(outputs) & set(example)):
        raise TaskError(f"an input and an output of the model are both named {both[0]!r}; rename one of them")
    model, shapes = computable(source.model), torch_shapes(example, dimensions)
    is_plain = source.form == 0  # one tensor
    try:
        from torch.onnx.errors import OnnxExporterError

        with _silence():
            torch.onnx.export(
                model if is_plain else _with_flat_inputs(model, source, list(example)),
                tuple(computable_tensor(one) for one in example.values()),
                path,
                dynamo=True,
                dynamic_shapes=shapes if is_plain else (shapes,),
                input_names=list(example),
                output_names=outputs,
                external_data=False,
                verbose=False,
            )
    except ImportError as cause:
        raise MissingExtra("export to ONNX", "train") from cause
    except OnnxExporterError as cause:
        root: BaseException = cause
        while root.__cause__ is not None:
            root = root.__cause__
        raise ParityError(f"the model cannot be exported to ONNX: {quoted(root)}{place_of(root)}") from cause


def _with_flat_inputs(model: torch.nn.Module, source: _Source, names: Sequence[str]) -> torch.nn.Module:
    """Return a model that takes its inputs' tensors as positional arguments."""
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> Structure:
            return call(self.model, unnamed(dict(zip(names, tensors, strict=True)), source.form, INPUT, source.names))

    return Flat().eval()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the exporter, which prints, warns about its internals and logs what it skips."""
    talk = io.StringIO()
    with (
        quiet_tracing(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(talk),
        contextlib.redirect_stderr(talk),
    ):
        warnings.simplefilter("ignore")
        yield
