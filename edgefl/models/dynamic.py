"""Dynamic dimensions of a model's inputs, beside the batch: declared by the task, tried at another size.

    Task(dynamic={"tokens": [1], "mask": [1]}, ...)                         axes by input
    Task(dynamic={"tokens": {1: "length"}, "mask": {1: "length"}}, ...)     axes with names: these have one size
    Task(dynamic={"tokens": {0: Dim("batch"), 1: Dim("length")}}, ...)      torch's dynamic_shapes

Axes of one name change together; so do those without a name whose sizes are equal in the example.
Invariant: axis 0 is the batch, which is dynamic in every input, and never a `Dimension`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgefl.errors import TaskError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dimension:
    """Axes that have one size."""

    size: int  # in the example
    axes: tuple[tuple[str, int], ...]  # (input, axis)
    name: str = ""  # given by the task

    def __str__(self) -> str:
        places = " and ".join(f"dimension {axis} of input {name!r}" for name, axis in self.axes)
        return f"{self.name!r} ({places})" if self.name else places

    def other_sizes(self) -> list[int]:
        """Return sizes to try, the most telling first: models take multiples, or up to a limit, or any."""
        size = self.size
        tried = (2 * size, size // 2, size + 1, size - 1, 3 * size, size + 32, size // 4, 4 * size, 8)
        return [one for one in dict.fromkeys(tried) if one > 1 and one != size]


def dimensions_of(dynamic: Any, inputs: Mapping[str, torch.Tensor]) -> list[Dimension]:
    """Return the dimensions that a task declares (`Task.dynamic`); raises TaskError if its inputs lack them."""
    if isinstance(dynamic, (tuple, list)):  # torch's form for positional arguments
        dynamic = dict(zip(inputs, dynamic, strict=False))
    if not isinstance(dynamic, Mapping):
        raise TaskError(f"dynamic is a {type(dynamic).__name__}; expected axes by the name of an input")
    groups: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for name, declared in dynamic.items():
        if name not in inputs:
            raise TaskError(f"dynamic names {name!r}, which is no input; there are {', '.join(inputs)}")
        for axis, label in _axes(name, declared).items():
            shape = inputs[name].shape
            if not 0 <= axis < len(shape):
                raise TaskError(f"dynamic names dimension {axis} of input {name!r}, whose shape is {list(shape)}")
            if axis > 0:
                groups.setdefault((label, -1 if label else shape[axis]), []).append((name, axis))
    return [Dimension(inputs[axes[0][0]].shape[axes[0][1]], tuple(axes), label) for (label, _), axes in groups.items()]


def resized(inputs: Mapping[str, torch.Tensor], dimension: Dimension, size: int) -> dict[str, torch.Tensor]:
    """Return inputs of another size of one dimension: cut, or repeated from the beginning."""
    import torch

    changed = dict(inputs)
    for name, axis in dimension.axes:
        one = changed[name]
        changed[name] = one.index_select(axis, torch.arange(size) % one.shape[axis]).contiguous()
    return changed


def torch_shapes(inputs: Mapping[str, torch.Tensor], dimensions: Sequence[Dimension]) -> tuple[dict[int, Any], ...]:
    """Return torch's dynamic_shapes of the inputs, in order."""
    import torch

    batch = torch.export.Dim("batch")
    shapes: dict[str, dict[int, Any]] = {name: {0: batch} for name in inputs}
    for dimension in dimensions:
        for name, axis in dimension.axes:
            shapes[name][axis] = torch.export.Dim.AUTO  # torch finds out which of them are equal
    return tuple(shapes.values())


def _axes(name: str, declared: Any) -> dict[int, str]:
    """Return the axes that are declared dynamic, with their names; "" = none."""
    if declared is None:
        return {}
    if isinstance(declared, Mapping):  # a value may be a name, one of torch's Dims or hints, or None for a fixed size
        found = {
            axis: one if isinstance(one, str) else str(getattr(one, "__name__", ""))
            for axis, one in declared.items()
            if one is not None and not isinstance(one, int)
        }
    elif isinstance(declared, (list, tuple, set, frozenset)):
        found = dict.fromkeys(declared, "")
    else:
        found = {declared: ""}
    if not all(type(axis) is int for axis in found):
        raise TaskError(f"dynamic[{name!r}] is {declared!r:.100}; expected axes, such as [1] or {{1: 'length'}}")
    return found
