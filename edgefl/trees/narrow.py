"""Numbers in fewer bits: float32 tensors that a tree stores as bfloat16, or as int8 with a scale for each group.

A tensor W is stored in one of three forms: whole; in bfloat16, of W's shape, named `..@bf16`; or in int8, of W's shape,
named `..@int8`, with a float32 scale for each `GROUP` neighbours of the flattened W, named `..@scale`. Then an element
is its int8 times its group's scale, and the largest of a group has 127. Users of a tree see float32 again.
bfloat16 rounds to the nearest. int8 rounds up or down at random, so that its mean is W (QSGD, Alistarh et al. 2017):
so the errors of many clients' updates cancel out in their mean. An element's error is below its scale.
Tensors of other dtypes, of fewer than `LEAST` elements, and factors of low rank stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.settings.server import BF16, EXACT
from edgefl.trees.block_tree import BlockTree, ComputedTree, read_block
from edgefl.trees.factors import is_factor
from edgefl.trees.spec import BFLOAT16, Array, TensorSpec, Tree, bfloat16, blocks

GROUP = 256  # elements of one scale; divides BLOCK_ELEMENTS
LEAST = 1024  # elements: of fewer, the names would cost more than the bits save
LARGEST = 127
_BF16, _INT8, _SCALE = "@bf16", "@int8", "@scale"
_FLOAT32 = np.dtype(np.float32)


def narrow_name(stored: str) -> str | None:
    """Return the name of the tensor of which this is a stored part; None for another form."""
    base, mark, kind = stored.rpartition("@")
    return base if mark + kind in {_BF16, _INT8, _SCALE} else None


def narrow_parts(name: str, stored: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names under which a tensor is stored in fewer bits; none if it is not."""
    if name + _BF16 in stored:
        return (name + _BF16,)
    return (name + _INT8, name + _SCALE) if name + _INT8 in stored else ()


def narrow_spec(name: str, stored: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return the spec of a tensor that is stored in fewer bits; raises ProtocolError if its parts do not fit."""
    parts = [one for one in (name + _BF16, name + _INT8, name + _SCALE) if one in stored]
    if name in stored or parts not in ([name + _BF16], [name + _INT8, name + _SCALE]):
        seen = ", ".join([*([name] if name in stored else ()), *parts])
        raise ProtocolError(
            f"tensor {name!r} is there as {seen}; expected it alone, or {name}{_BF16}, or {name}{_INT8} and "
            f"{name}{_SCALE}"
        )
    values, dtypes = stored[parts[0]], [stored[one].dtype.name for one in parts]
    if dtypes not in ([BFLOAT16], ["int8", "float32"]):
        raise ProtocolError(f"tensor {name!r} is stored as {', '.join(dtypes)}; expected bfloat16, or int8 and float32")
    if len(parts) > 1 and stored[parts[1]].shape != (num_groups(values.size),):
        raise ProtocolError(
            f"tensor {name!r} of {values.size} elements has scales {list(stored[parts[1]].shape)}; expected "
            f"[{num_groups(values.size)}], one for each {GROUP}"
        )
    return TensorSpec(values.shape, _FLOAT32)


def widened(parts: tuple[str, ...], stored: Tree, block: slice) -> Array:
    """Return these elements of a flattened tensor, in float32, from its stored parts."""
    values = read_block(stored, parts[0], block).astype(_FLOAT32)
    if len(parts) == 1:
        return values
    start, first = block.start or 0, (block.start or 0) // GROUP
    scales = read_block(stored, parts[1], slice(first, num_groups(start + len(values))))
    inside = start - first * GROUP
    with np.errstate(over="ignore", invalid="ignore"):  # a peer's scales may be anything; guards look at the result
        values *= np.repeat(scales, GROUP)[inside : inside + len(values)]
    return values


def narrowed_spec(spec: Mapping[str, TensorSpec], form: str) -> dict[str, TensorSpec]:
    """Return how a tree of this stored spec is stored in a form."""
    found: dict[str, TensorSpec] = {}
    for name, one in spec.items():
        if not _is_narrowed(name, one, form):
            found[name] = one
        elif form == BF16:
            found[name + _BF16] = TensorSpec(one.shape, bfloat16())
        else:
            found[name + _INT8] = TensorSpec(one.shape, np.dtype(np.int8))
            found[name + _SCALE] = TensorSpec((num_groups(one.size),), _FLOAT32)
    return found


def narrowed(stored: Tree, spec: Mapping[str, TensorSpec], form: str, seed: int) -> Tree:
    """Return what is stored of a tree, of this spec, in a form; `seed` is of the rounding to int8.

    A tree that is read by blocks is converted to bfloat16 when it is read.
    """
    if form == BF16 and isinstance(stored, BlockTree) and stored.reads_blocks:
        new = narrowed_spec(spec, form)
        old = {name + _BF16 if _is_narrowed(name, one, form) else name: name for name, one in spec.items()}
        return ComputedTree(new, lambda name, block: _cast(read_block(stored, old[name], block), new[name].dtype))
    made: dict[str, Array] = {}
    for number, (name, one) in enumerate(spec.items()):
        if not _is_narrowed(name, one, form):
            made[name] = stored[name]
        elif form == BF16:
            made[name + _BF16] = _cast(stored[name], bfloat16())
        else:
            rng = np.random.default_rng([seed, number])
            made[name + _INT8], made[name + _SCALE] = _to_int8(stored[name], rng)
    return made


def num_groups(size: int) -> int:
    """Return how many scales so many elements have."""
    return math.ceil(size / GROUP)


def _is_narrowed(name: str, one: TensorSpec, form: str) -> bool:
    return form != EXACT and one.dtype == _FLOAT32 and one.size >= LEAST and not is_factor(name)


def _cast(values: Array, dtype: np.dtype[np.generic]) -> Array:
    with np.errstate(over="ignore"):  # to infinity, which guards refuse
        return values.astype(dtype)


def _to_int8(values: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return int8 values, of the same shape, and the groups' scales."""
    flat, small = values.reshape(-1), np.empty(values.size, np.int8)
    scales = np.zeros(num_groups(values.size), _FLOAT32)
    for block in blocks(flat.size):
        part = flat[block]
        groups = num_groups(part.size)
        grouped = np.zeros((groups, GROUP), _FLOAT32)
        grouped.reshape(-1)[: part.size] = part
        first = block.start // GROUP
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):  # a group that is not finite stays so
            own = scales[first : first + groups] = np.abs(grouped).max(axis=1) / np.float32(LARGEST)
            grouped /= np.where(own > 0, own, 1)[:, None]
            grouped += rng.random(grouped.shape, dtype=np.float32)
            rounded = np.floor(grouped).clip(-LARGEST, LARGEST).astype(np.int8)
        small[block] = rounded.reshape(-1)[: part.size]
    return small.reshape(values.shape), scales
