"""A task's own `fit`: what it is given, and what may come back.

Invariant: what leaves here is an update that a guard admits, or a TaskError that says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.frozen import whole
from edgefl.guards import wrong_spec, wrong_weight
from edgefl.task import FitResult, Task, UserCode
from edgefl.trees import Tree, spec_of


def fit_of(
    task: Task, parameters: Tree, config: TrainConfig, options: Mapping[str, str], frozen: Tree | None
) -> FitResult:
    """Return what the task's `fit` makes of all tensors: an update of what moves; raises TaskError."""
    if task.fit is None:
        raise TaskError(f"task {task.name!r} has no fit")
    with UserCode(task.name, "fit"):
        result = task.fit(whole(parameters, frozen), config, options)
    if not isinstance(result, FitResult):
        raise TaskError(f"task {task.name!r}: fit returned a {type(result).__name__}, not an edgefl.FitResult")
    refuse_tree(task, "fit", result.tree)
    try:
        weight, metrics = float(result.weight), {str(name): float(value) for name, value in result.metrics.items()}
    except (TypeError, ValueError, AttributeError) as cause:
        raise TaskError(f"task {task.name!r}: fit's weight and metrics must be numbers: {cause}") from cause
    if fault := wrong_spec(spec_of(result.tree), spec_of(parameters)) or wrong_weight(weight):
        raise TaskError(f"task {task.name!r}: fit returned what cannot be an update: {fault}")
    return FitResult(tree=result.tree, weight=weight, metrics=metrics)


def refuse_tree(task: Task, what: str, tree: object) -> None:
    """Raise TaskError for what is no tree."""
    if not isinstance(tree, Mapping) or not tree:
        raise TaskError(f"task {task.name!r}: {what} returned a {type(tree).__name__}, not a tree of named arrays")
    for name, array in tree.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise TaskError(f"task {task.name!r}: {what}'s {name!r} is a {type(array).__name__}, not a numpy array")
