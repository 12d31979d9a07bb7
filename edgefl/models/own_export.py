"""The export of a task with its own `fit`: a model as ONNX that the task's `export` made, checked before it is kept.

`export(parameters)` returns the model, as bytes or an onnx.ModelProto, alone or as (model, inputs, outputs): inputs,
an array or arrays by name, and what the library itself predicts for them, an array or arrays by output.
Invariant: the target file exists only if ONNX Runtime opens it and, if there are predictions, it computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ConfigError, ParityError, TaskError
from edgefl.models.sample import BATCHES
from edgefl.models.session import open_session, run_errors
from edgefl.task import Task, UserCode
from edgefl.terminal.extras import extra_of, install_command
from edgefl.trees import Array, Tree

TOLERANCE = 1e-4  # of floats, relative to the largest prediction, or to 1 if all are smaller
MAX_MODEL_BYTES = 2 << 30  # of a protobuf message


@dataclass(frozen=True, slots=True)
class OwnModel:
    """What a task's `export` returned."""

    data: bytes
    inputs: Tree  # by name; empty if it returned none
    outputs: Tree


def refuse_unexportable(task: Task) -> None:
    """Raise TaskError for a task without a model and without an `export`."""
    if task.model is None:
        _export_of(task)


def export_own(task: Task, parameters: Tree, path: Path) -> list[Tree]:
    """Write the model that the task's `export` makes; return inputs for the release's sample, if it gave some.

    Raises TaskError if `export` raises or returns something else, ParityError if the file predicts something else.
    """
    export = _export_of(task)
    half = path.with_name(f".{path.name}.half")
    try:
        model = made(task, export, parameters)
        half.write_bytes(model.data)
        try:
            session = open_session(half)
        except ConfigError as cause:
            raise TaskError(
                f"task {task.name!r}: export returned no ONNX model that can be run: {cause.__cause__}"
            ) from cause
        model = _named(task, model, session)
        if model.inputs:
            _compare(task, model, session)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    rows = [min(len(one) for one in model.inputs.values())] if model.inputs else []
    return [{name: one[:few] for name, one in model.inputs.items()} for few in BATCHES if rows and few <= rows[0]]


def _export_of(task: Task) -> Callable[[Tree], Any]:
    if task.export is None:
        raise TaskError(f"task {task.name!r} has no model and no export(parameters), so there is nothing to export")
    return task.export


def made(task: Task, export: Callable[[Tree], Any], parameters: Tree) -> OwnModel:
    """Call a task's `export`, and check the types of what it returns."""
    try:
        with UserCode(task.name, "export"):
            returned = export(parameters)
    except TaskError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and (extra := extra_of(cause.name)):
            raise TaskError(f"{error}. Install it: {install_command(extra)}") from cause
        raise
    is_tuple = isinstance(returned, tuple)
    if is_tuple and len(returned) != 3:
        raise TaskError(
            f"task {task.name!r}: export returned {len(returned)} values; expected a model, or (model, inputs, outputs)"
        )
    model, inputs, outputs = returned if is_tuple else (returned, {}, {})
    if hasattr(model, "SerializeToString"):  # onnx.ModelProto
        with UserCode(task.name, "writing the model that export returned"):
            model = model.SerializeToString()
    if not isinstance(model, bytes | bytearray) or not 0 < len(model) < MAX_MODEL_BYTES:
        seen = f"{len(model)} bytes" if isinstance(model, bytes | bytearray) else f"a {type(model).__name__}"
        raise TaskError(
            f"task {task.name!r}: export returned {seen}; expected an ONNX model, as bytes or an onnx.ModelProto"
        )
    return OwnModel(bytes(model), _arrays(task, "inputs", inputs), _arrays(task, "outputs", outputs))


def _arrays(task: Task, what: str, value: object) -> dict[str, Array]:
    """Return arrays by name; one array without a name has the name ""."""
    given = value if isinstance(value, Mapping) else {"": value}
    with UserCode(task.name, f"reading the {what} that export returned"):
        arrays = {str(name): np.asarray(one) for name, one in given.items()}
    for name, one in arrays.items():
        if one.ndim == 0 or len(one) == 0 or one.dtype.kind not in "biufSU":
            raise TaskError(
                f"task {task.name!r}: export's {what} {name!r} are {one.dtype}{list(one.shape)}; expected an array "
                "with a row for each of at least one sample"
            )
    return arrays


def _named(task: Task, model: OwnModel, session: Any) -> OwnModel:
    """Give a single array the name that the model has for it; raises TaskError for other names than the model's."""
    inputs = _by_name(task, "input", model.inputs, [one.name for one in session.get_inputs()])
    outputs = _by_name(task, "output", model.outputs, [one.name for one in session.get_outputs()])
    if missing := [one.name for one in session.get_inputs() if (inputs or outputs) and one.name not in inputs]:
        raise TaskError(f"task {task.name!r}: export returned no array for the model's input {missing[0]!r}")
    return OwnModel(model.data, inputs, outputs)


def _by_name(task: Task, what: str, arrays: Tree, names: Sequence[str]) -> dict[str, Array]:
    found = {name or names[0]: one for name, one in arrays.items()}
    if strange := [name for name in found if name not in names]:
        raise TaskError(
            f"task {task.name!r}: export returned an array for the {what} {strange[0]!r}; the model has "
            f"{', '.join(names)}"
        )
    return found


def _compare(task: Task, model: OwnModel, session: Any) -> None:
    try:
        found = session.run(list(model.outputs), dict(model.inputs))
    except run_errors() as cause:
        raise ParityError(f"task {task.name!r}: the exported model does not run on export's inputs: {cause}") from cause
    for (name, wanted), seen in zip(model.outputs.items(), map(np.asarray, found), strict=True):
        if why := _difference(wanted, seen):
            raise ParityError(
                f"task {task.name!r}: the exported model's {name!r} is not what the library predicts: {why}"
            )


def _difference(wanted: Array, seen: Array) -> str:
    if wanted.size != seen.size or len(wanted) != len(seen):
        return f"it has the shape {list(seen.shape)}, the prediction {list(wanted.shape)}"
    seen = seen.reshape(wanted.shape)  # (N, 1) is as good as (N,)
    if wanted.dtype.kind != "f" or seen.dtype.kind != "f":
        are_numbers = wanted.dtype.kind in "biuf" and seen.dtype.kind in "biuf"
        different = int((wanted != seen if are_numbers else wanted.astype(str) != seen.astype(str)).sum())
        return f"{different} of {wanted.size} values differ" if different else ""
    apart = float(np.abs(seen.astype(np.float64) - wanted).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    return "" if apart <= allowed else f"it differs by {apart:.3g}, allowed: {allowed:.3g}"  # NaN differs
