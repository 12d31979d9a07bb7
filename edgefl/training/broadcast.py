"""A loss that broadcasts: outputs (N, 1) against targets (N,) are compared N x N, and training looks as if it worked.

A task's loss is a mean over its batch. Where outputs and targets of floating point differ in dimensions of size 1
alone, a few samples are given to it together and one by one: a loss that broadcasts is not the mean of its values for
single samples, but becomes so when the outputs have the targets' shape. All other losses are left alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgefl.errors import TaskError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

MAX_SAMPLES = 8
_REL_TOLERANCE = 1e-4


def refuse_broadcast(task: str, loss: Callable[[Any, Any], Any], outputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise TaskError, with both shapes, if a loss broadcasts these outputs and targets against each other."""
    import torch

    if not (isinstance(outputs, torch.Tensor) and outputs.is_floating_point() and targets.is_floating_point()):
        return
    few, wanted = outputs[:MAX_SAMPLES].detach(), targets[:MAX_SAMPLES]
    if len(few) < 2 or few.shape == wanted.shape or few.numel() != wanted.numel():
        return
    if _without_ones(few) != _without_ones(wanted):
        return
    as_is = float(loss(few, wanted))
    try:
        in_shape = float(loss(few.reshape(wanted.shape), wanted))
        alone = [float(loss(few[n : n + 1], wanted[n : n + 1])) for n in range(len(few))]
    except (RuntimeError, ValueError, IndexError, TypeError):  # it handles these shapes, and no others
        return
    mean = sum(alone) / len(alone)
    if _is_close(in_shape, mean) and not _is_close(as_is, mean):
        raise TaskError(
            f"task {task!r}: its loss broadcasts outputs {_shape(outputs)} against targets {_shape(targets)}, so each "
            f"output is compared with every target: {as_is:.4g} instead of {in_shape:.4g} for {len(few)} samples. Give "
            "both the same shape, e.g. targets[:, None] in the loader or outputs.squeeze(1) in the loss"
        )


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_REL_TOLERANCE, abs_tol=1e-7)


def _without_ones(tensor: torch.Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(['N', *map(str, tensor.shape[1:])])})".replace("(N)", "(N,)")
