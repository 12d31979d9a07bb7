"""A task's own `fit`: its arguments, and checks of its result.

It may have matrices of low rank (`edgefl.trees.factors`): `w@lora_B` (N, R) and `w@lora_A` (R, M) of an update are the
change of `w@lora` (N, M), of which `initial` has factors of rank 0, or the whole; `fit` gets either.

Invariant: the result is an update that a guard admits, or a TaskError that says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError, TaskError
from edgefl.guards import wrong_spec, wrong_weight
from edgefl.task import FitResult, Task, UserCode
from edgefl.trees import Array, EncodedTree, Tree, spec_of, why_not_sent
from edgefl.trees.frozen import whole


def fit_of(
    task: Task, parameters: Tree, config: TrainConfig, options: Mapping[str, str], frozen: Tree | None
) -> FitResult:
    """Call the task's `fit` with all tensors; return an update of the changing ones. Raises TaskError."""
    if task.fit is None:
        raise TaskError(f"task {task.name!r} has no fit")
    with UserCode(task.name, "fit"):
        result = task.fit(whole(parameters, frozen), config, options)
    if not isinstance(result, FitResult):
        raise TaskError(f"task {task.name!r}: fit returned a {type(result).__name__}, not an edgefl.FitResult")
    if result.state:
        raise TaskError(f"task {task.name!r}: fit returned a state, which only a client of a task with a model keeps")
    tree = matrices_of(task, "fit", arrays_of(task, "fit", result.tree))
    try:
        weight, metrics = (
            float(result.weight),
            {_of_training(str(name)): float(value) for name, value in result.metrics.items()},
        )
    except (TypeError, ValueError, AttributeError) as cause:
        raise TaskError(f"task {task.name!r}: fit's weight and metrics must be numbers: {cause}") from cause
    if fault := wrong_spec(spec_of(tree), spec_of(parameters)) or wrong_weight(weight):
        raise TaskError(f"task {task.name!r}: fit returned what cannot be an update: {fault}")
    return FitResult(tree=tree, weight=weight, metrics=metrics)


def matrices_of(task: Task, what: str, arrays: Mapping[str, Array]) -> Tree:
    """Return a tree whose factors of low rank are matrices; raises TaskError if they are no pairs."""
    try:
        tree = EncodedTree(arrays)
    except ProtocolError as cause:
        raise TaskError(f"task {task.name!r}: what {what} returned cannot be sent: {cause}") from cause
    return tree if tree.factored else arrays


def _of_training(name: str) -> str:
    """Return a name that says that the number comes from training, on the devices' own samples."""
    return name if name.startswith("train_") else f"train_{name}"


def arrays_of(task: Task, what: str, tree: object) -> dict[str, Array]:
    """Return a tree that can be sent: arrays in this machine's byte order; raises TaskError for anything else.

    Arithmetic on 0-d numpy arrays gives scalars; they are accepted as 0-d arrays.
    """
    if not isinstance(tree, Mapping) or not tree:
        raise TaskError(f"task {task.name!r}: {what} returned a {type(tree).__name__}, not a tree of named arrays")
    arrays: dict[str, Array] = {}
    for name, array in tree.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray | np.generic):
            raise TaskError(f"task {task.name!r}: {what}'s {name!r} is a {type(array).__name__}, not a numpy array")
        if why := why_not_sent(array.dtype):
            raise TaskError(f"task {task.name!r}: {what}'s {name!r} is {array.dtype}{list(array.shape)}: {why}")
        arrays[name] = np.asarray(array, array.dtype.newbyteorder("="))
    return arrays
