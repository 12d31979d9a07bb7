"""The layout of a structure of tensors as text: its form, and each tensor's dtype and shape.

The cloud traces a model for inputs of a device's layout, and gives the loss targets of the form that the task expects,
without seeing the inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgefl.errors import ProtocolError, TaskError
from edgefl.training.structures import Structure

if TYPE_CHECKING:
    import torch

MAX_EXAMPLE_BYTES = 256 << 20
MAX_DEPTH = 16
TARGET = "target"  # the prefix of the targets' leaves
_DTYPES = (
    "float32", "float16", "float64", "bfloat16", "bool", "int8", "uint8", "int16", "int32", "int64",
)  # fmt: skip


def layout_of(structure: Structure) -> str:
    """Return the layout; raises TaskError for what is no tensor, tuple, list or dict of them."""
    return json.dumps(_described(structure), separators=(",", ":"))


def example_of(layout: str) -> Structure:
    """Return a structure of this layout, of zeros; raises ProtocolError for a text that is none, or too large."""
    import torch

    def zeros(dtype: str, shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=getattr(torch, dtype))

    return _built(_parsed(layout), zeros)


def filled(layout: str, tensors: Mapping[str, torch.Tensor]) -> Structure:
    """Return a structure of this layout with these tensors, `target.0` and so on; raises ProtocolError."""
    numbers = iter(range(len(tensors)))

    def one(dtype: str, shape: Sequence[int]) -> torch.Tensor:
        name = f"{TARGET}.{next(numbers, -1)}"
        if name not in tensors or str(tensors[name].dtype) != f"torch.{dtype}" or [*tensors[name].shape] != [*shape]:
            seen = "is missing" if name not in tensors else f"is {tensors[name].dtype}{list(tensors[name].shape)}"
            raise ProtocolError(f"tensor {name!r} {seen}; the layout says {dtype}{list(shape)}")
        return tensors[name]

    return _built(_parsed(layout), one)


def with_rows(layout: str, num: int) -> str:
    """Return the layout of as many rows: the first dimension of each tensor."""
    return layout_of(_built(_parsed(layout), lambda dtype, shape: _Bare(dtype, [num, *shape[1:]])))


@dataclass(frozen=True, slots=True)
class _Bare:
    """A tensor's dtype and shape."""

    dtype: str
    shape: Sequence[int]


def _described(structure: Structure) -> Any:
    import torch

    if isinstance(structure, torch.Tensor | _Bare):
        return [str(structure.dtype).removeprefix("torch."), list(structure.shape)]
    if type(structure) in (tuple, list):
        return {"tuple" if type(structure) is tuple else "list": [_described(one) for one in structure]}
    if type(structure) is dict and all(isinstance(key, str) for key in structure):
        return {"dict": {key: _described(one) for key, one in structure.items()}}
    raise TaskError(
        f"inputs and targets of training in parts are tensors, tuples, lists and dicts of them; this is a "
        f"{type(structure).__name__}"
    )


def _parsed(layout: str) -> Any:
    try:
        return json.loads(layout)
    except (ValueError, RecursionError) as cause:
        raise ProtocolError(f"{layout[:80]!r} is no layout of tensors") from cause


def _built(described: Any, make: Any, depth: int = 0) -> Structure:
    match described:
        case [str(dtype), list(shape)] if dtype in _DTYPES and all(type(one) is int and one >= 0 for one in shape):
            if len(shape) > 8 or math.prod(shape) * 8 > MAX_EXAMPLE_BYTES:
                raise ProtocolError(f"a layout has a tensor {dtype}{shape}; allowed: {MAX_EXAMPLE_BYTES} bytes")
            return make(dtype, shape)
        case {"tuple": list(items)} if depth < MAX_DEPTH:
            return tuple(_built(one, make, depth + 1) for one in items)
        case {"list": list(items)} if depth < MAX_DEPTH:
            return [_built(one, make, depth + 1) for one in items]
        case {"dict": dict(items)} if depth < MAX_DEPTH:
            return {key: _built(one, make, depth + 1) for key, one in items.items()}
    raise ProtocolError(f"{str(described)[:80]!r} is no layout of tensors")
