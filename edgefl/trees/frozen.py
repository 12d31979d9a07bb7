"""What a client does not train: it stays as it is, and does not travel.

A parameter that requires no gradient is frozen. Which ones are is the same on every device and in every
round of a job, since a round moves the trained part alone.
Invariant: a frozen tensor after local training is what it was before, bit for bit, or there is no update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgefl.errors import TaskError
from edgefl.trees import Array, Tree, blocks

if TYPE_CHECKING:
    import torch


def whole(moving: Tree, frozen: Tree | None) -> Tree:
    """Return all tensors of a model from its two parts, copying none."""
    return {**frozen, **moving} if frozen else moving


def refuse_other_parts(task: str, model: torch.nn.Module, frozen: Tree) -> None:
    """Raise TaskError where the model trains what the job has frozen, or the other way round."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad == (name in frozen):
            here, there = ("trained", "frozen") if parameter.requires_grad else ("frozen", "trained")
            raise TaskError(
                f"task {task!r}: parameter {name!r} is {here} here and {there} in the job. Which parameters require "
                "a gradient is settled when a job is submitted, and is the same on every device and in every round"
            )


def refuse_moved(task: str, tensors: Tree, frozen: Tree) -> None:
    """Raise TaskError where local training has changed a tensor that is frozen: its change would not travel."""
    for name, before in frozen.items():
        if not _same(tensors[name], before):
            raise TaskError(
                f"task {task!r}: local training changed {name!r}, which requires no gradient and so stays on the "
                "device. Make it a buffer (register_buffer): those travel"
            )


def _same(now: Array, before: Array) -> bool:
    """Compare values; NaN is equal to itself."""
    if now.flags.c_contiguous and before.flags.c_contiguous:
        flat_now, flat_before = now.reshape(-1).view(np.uint8), before.reshape(-1).view(np.uint8)
        return all(np.array_equal(flat_now[block], flat_before[block]) for block in blocks(flat_now.size))
    return np.asarray(now).tobytes() == np.asarray(before).tobytes()
