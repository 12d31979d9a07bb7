"""A loss that broadcasts: outputs (N, 1) against targets (N,) are compared N x N, and training looks as if it worked.

A task's loss is a mean over its batch. Where outputs and targets of floating point differ in dimensions of size 1
alone, a few samples are given to it together and one by one: a loss that broadcasts is not the mean of its values for
single samples, but becomes so when the outputs have the targets' shape. Of structures, outputs and targets of the same
names are compared. All other losses are left alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgefl.errors import TaskError
from edgefl.training.structures import Structure, leaves, mapped, named, num_rows, rows, unnamed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

MAX_SAMPLES = 8
_REL_TOLERANCE = 1e-4


def refuse_broadcast(task: str, loss: Callable[[Any, Any], Any], outputs: Structure, targets: Structure) -> None:
    """Raise TaskError, with both shapes, if a loss broadcasts these outputs and targets against each other."""
    pair = _differing(outputs, targets)
    if pair is None:
        return
    few, wanted = (mapped(lambda one: one[:MAX_SAMPLES].detach(), part) for part in (outputs, targets))
    as_is = float(loss(few, wanted))
    try:
        in_shape = float(loss(_reshaped(few, wanted), wanted))
        num_alone = num_rows(leaves(wanted)[0])
        alone = [float(loss(*(rows(part, slice(n, n + 1)) for part in (few, wanted)))) for n in range(num_alone)]
    except (RuntimeError, ValueError, IndexError, TypeError):  # it handles these shapes, and no others
        return
    mean = sum(alone) / len(alone)
    if _is_close(in_shape, mean) and not _is_close(as_is, mean):
        raise TaskError(
            f"task {task!r}: its loss broadcasts outputs {_shape(pair[0])} against targets {_shape(pair[1])}, so each "
            f"output is compared with every target: {as_is:.4g} instead of {in_shape:.4g} for {len(alone)} samples. "
            "Give both the same shape, e.g. targets[:, None] in the loader or outputs.squeeze(1) in the loss"
        )


def _differing(outputs: Structure, targets: Structure) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the first output and its target that differ in dimensions of size 1 alone, if there are any."""
    import torch

    if isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor):
        return (outputs, targets) if _differ(outputs, targets) else None
    every = [*leaves(outputs), *leaves(targets)]
    if not all(isinstance(one, torch.Tensor) and one.dim() for one in every) or len({len(one) for one in every}) != 1:
        return None
    try:
        found, wanted = named(outputs, ""), named(targets, "")
    except TaskError:  # names that ONNX cannot have do not matter here
        return None
    if found.keys() != wanted.keys():
        return None
    return next(((one, wanted[name]) for name, one in found.items() if _differ(one, wanted[name])), None)


def _differ(output: torch.Tensor, target: torch.Tensor) -> bool:
    if not (output.is_floating_point() and target.is_floating_point()):
        return False
    few, wanted = output[:MAX_SAMPLES], target[:MAX_SAMPLES]
    if len(few) < 2 or few.shape == wanted.shape or few.numel() != wanted.numel():
        return False
    return _without_ones(few) == _without_ones(wanted)


def _reshaped(outputs: Structure, targets: Structure) -> Structure:
    """Return the outputs, those that differ from their targets by dimensions of size 1 in the targets' shape."""
    found, wanted = named(outputs, ""), named(targets, "")
    changed = {name: one.reshape(wanted[name].shape) if _differ(one, wanted[name]) else one for name, one in
               found.items()}  # fmt: skip
    return unnamed(changed, outputs, "")


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_REL_TOLERANCE, abs_tol=1e-7)


def _without_ones(tensor: torch.Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(['N', *map(str, tensor.shape[1:])])})".replace("(N)", "(N,)")
