"""How the values that a user's loader, Dataset or `collate` returns become tensors.

A tuple or a dict is a structure; anything else is one array: a tensor, or what numpy reads. A list that a loader
returns is one array, too, sample by sample; in an item or a batch of a Dataset it is a structure, as for torch's
`default_collate`, unless it is written in numbers alone. Structures get tuples for lists.
Invariant: a value gives the same tensors wherever it comes from, so that a Dataset and arrays of the same data do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import TaskError
from edgefl.task import Task, UserCode
from edgefl.training.randomness import seeded
from edgefl.training.structures import INPUT, TARGET, Structure, described, leaves, num_rows
from edgefl.trees import Array, is_float
from edgefl.trees.tensors import tensor_of

if TYPE_CHECKING:
    import torch

_NUMBERS = "fiub"  # numpy kinds: floats, integers, booleans


def pair_of(task: Task, what: str, loaded: Any, expected: str = "(inputs, targets)") -> tuple[Any, Any]:
    """Return (inputs, targets) as they were returned by the user's `what`; raises TaskError for anything else."""
    if isinstance(loaded, (tuple, list)) and len(loaded) == 2:
        return loaded[0], loaded[1]
    seen = f"{len(loaded)} values" if isinstance(loaded, (tuple, list)) else type(loaded).__name__
    raise TaskError(f"task {task.name!r}: {what} returned {seen}, not {expected}")


def tensors_of(task: Task, what: str, value: Any, *, lists: bool = False) -> Structure:
    """Return a structure of tensors, on the device that they come from; raises TaskError for what is no number.

    `lists`: whether lists are structures, as those of a Dataset are.
    """
    import torch

    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return value
    if isinstance(value, Mapping):
        if not value:
            raise TaskError(f"task {task.name!r}: {what} are an empty dict, without any tensor")
        return {key: tensors_of(task, f"{what}[{key!r}]", one, lists=lists) for key, one in value.items()}
    if (isinstance(value, tuple) or (lists and isinstance(value, list))) and _has_arrays(value):
        parts = [tensors_of(task, f"{what}[{n}]", one, lists=lists) for n, one in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return _tensor_of(task, what, value)


def num_samples(task: Task, what: str, inputs: Structure, targets: Structure) -> int:
    """Return the first dimension that all tensors have; raises TaskError, with all shapes, if they differ."""
    import torch

    for part, base, name in ((inputs, INPUT, "inputs"), (targets, TARGET, "targets")):
        if any(isinstance(one, torch.Tensor) and one.dim() == 0 for one in leaves(part)):
            raise TaskError(
                f"task {task.name!r}: {what}'s {name} are a single number ({described(part, base)}); the first "
                "dimension counts the samples"
            )
    numbers = [{num_rows(one) for one in leaves(part)} for part in (inputs, targets)]
    shapes = f"{described(inputs, INPUT)}; {described(targets, TARGET)}"
    if any(len(one) != 1 for one in numbers):
        raise TaskError(
            f"task {task.name!r}: {what} returned {shapes}: the first dimension counts the samples, and must be the "
            "same for all"
        )
    (num_inputs,), (num_targets,) = numbers
    if num_inputs != num_targets:
        raise TaskError(f"task {task.name!r}: {what} returned {num_inputs} inputs but {num_targets} targets: {shapes}")
    return num_inputs


def _has_arrays(value: Sequence[Any]) -> bool:
    """Whether a tuple or list is more than one array written in numbers."""
    return any(
        _has_arrays(one) if isinstance(one, (tuple, list)) else isinstance(one, Mapping) or hasattr(one, "__array__")
        for one in value
        if not isinstance(one, np.generic)
    )


def _tensor_of(task: Task, what: str, value: Any) -> torch.Tensor:
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach()
    with UserCode(task.name, f"reading {what}"):
        array = _array_of(value)
    if array.dtype.kind not in _NUMBERS and not is_float(array.dtype):
        raise TaskError(
            f"task {task.name!r}: {what} are {array.dtype} and not numbers (real ones, integers or booleans)"
        )
    if array.dtype == np.float64 and not keeps_float64(task):  # numpy's default, but rare in models
        array = array.astype(np.float32)
    with UserCode(task.name, f"reading {what}"):
        return tensor_of(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _array_of(value: Any) -> Array:
    try:
        return np.asarray(value)
    except ValueError as cause:
        if not isinstance(value, list):
            raise
        raise ValueError(
            f"a list is one array, sample by sample, and these do not fit into one ({cause}). Return several inputs as "
            "a tuple or a dict, and sequences of different lengths as a Dataset with a collate"
        ) from cause


def keeps_float64(task: Task) -> bool:
    """Whether the task's model has float64 parameters: then its samples stay in float64, too."""
    if task.model is None:
        return False
    with seeded(0), UserCode(task.name, "model"):
        return _makes_float64(task.model)


@lru_cache(maxsize=16)  # one model for all clients of a simulation
def _makes_float64(make: Callable[[], torch.nn.Module]) -> bool:
    import torch

    return any(one.dtype == torch.float64 for one in make().parameters())
