"""Export PyTorch to ONNX; the file is kept only if it computes the same as the model.

The graph takes one tensor "input" and returns one tensor "output", both with a free batch dimension.
Tracing with one sample silently fixes the batch size of some models, so at least two are traced, and
batch sizes 1, 2 and 3 are compared.
Invariant: the target file exists only if it agreed with the model at every batch size tried.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import MissingExtra, ParityError, TaskError
from edgefl.models.own_export import export_own
from edgefl.models.sample import BATCHES
from edgefl.models.session import INPUT, OUTPUT, open_session, ort_errors
from edgefl.task import Task, UserCode
from edgefl.terminal.user_code import place_of, quoted
from edgefl.training.local import make_model
from edgefl.training.quiet import quiet_tracing
from edgefl.training.samples import require_torch, test_samples, train_samples
from edgefl.trees import Array, Tree

if TYPE_CHECKING:
    import torch

PARITY_BATCHES = (1, 2, 3)
TOLERANCE = 1e-4  # relative to the largest output, or to 1 if all outputs are smaller


def export_task(task: Task, parameters: Tree, path: Path) -> list[Tree]:
    """Export the task's model with these parameters; the example inputs come from its test or training data.

    A task with its own `fit` makes the file itself, see `edgefl.models.own_export`.

    Returns inputs for the release's sample: by name, in batches of `edgefl.models.sample.BATCHES`.
    Raises TaskError if there is no model or data, ParityError if the export computes something else.
    """
    if task.model is None:
        return export_own(task, parameters, path)
    model = make_model(task, parameters)
    samples = test_samples(task, {}) if task.test_data is not None else train_samples(task, {})
    examples = samples.first(max(PARITY_BATCHES)).inputs
    export_onnx(model, examples, path)
    return [{INPUT: _batch(examples.detach().cpu(), batch).numpy()} for batch in BATCHES]


def export_onnx(model: torch.nn.Module, example_inputs: torch.Tensor, path: Path) -> None:
    """Export a model with one input and one output tensor, in evaluation mode, into one file.

    Raises ParityError if the exported graph computes something else; then no file is left.
    """
    require_torch("export to ONNX")
    import torch

    evaluated = copy.deepcopy(model).cpu().eval()  # the caller's model keeps its mode and device
    example = _batch(example_inputs.detach().cpu(), max(2, len(example_inputs)))
    half = path.with_name(f".{path.name}.half")
    with torch.no_grad(), UserCode(type(model).__name__, "the model"):
        evaluated(example)  # an error of its own is told as it is, and not as the exporter meets it
    try:
        _trace(evaluated, example, half)
        check_parity(evaluated, half, example)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def check_parity(model: torch.nn.Module, path: Path, example: torch.Tensor) -> None:
    """Raise ParityError unless the file computes the same as the model, at batch sizes 1, 2 and 3."""
    import torch

    session = open_session(path)
    for batch in PARITY_BATCHES:
        inputs = _batch(example, batch)
        with torch.no_grad(), UserCode(type(model).__name__, f"the model at batch {batch}"):
            wanted = model(inputs)
        if not isinstance(wanted, torch.Tensor):
            raise ParityError(f"the model returns a {type(wanted).__name__}; expected one tensor")
        _compare(wanted.numpy(), _run(session, inputs.numpy(), batch), batch)


def _compare(wanted: Array, seen: Array, batch: int) -> None:
    if seen.shape != wanted.shape:
        raise ParityError(f"at batch {batch} the exported model returns shape {seen.shape}, its source {wanted.shape}")
    difference = float(np.abs(seen.astype(np.float64) - wanted).max(initial=0.0))
    allowed = TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0.0)))
    if not difference <= allowed:  # also if it is NaN
        raise ParityError(
            f"at batch {batch} the exported model differs from its source by {difference:.3g}, allowed: {allowed:.3g}"
        )


def _run(session: Any, inputs: Array, batch: int) -> Array:
    try:
        return np.asarray(session.run([OUTPUT], {INPUT: inputs})[0])
    except ort_errors() as cause:
        raise ParityError(f"at batch {batch} the exported model does not run: {cause}") from cause


def _batch(example: torch.Tensor, size: int) -> torch.Tensor:
    """Return `size` samples, repeating the given ones if there are fewer."""
    import torch

    if len(example) == 0:
        raise TaskError("an export needs at least one example input, got 0")
    return example[torch.arange(size) % len(example)]


def _trace(model: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
    import torch

    try:
        from torch.onnx.errors import OnnxExporterError

        with _silence():
            torch.onnx.export(
                model,
                (example,),
                path,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
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
