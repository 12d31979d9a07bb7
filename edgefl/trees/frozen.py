"""Frozen tensors: a client does not train them, so they do not change and are not sent in rounds.

A parameter that requires no gradient is frozen. The frozen set is the same on every device and in every
round of a job, because a round sends only the trained part.
Invariant: local training does not change a frozen tensor, bit for bit, or there is no update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgefl.errors import TaskError
from edgefl.trees import Array, BlockTree, Tree, blocks
from edgefl.trees.views import joined

if TYPE_CHECKING:
    import torch


def whole(moving: Tree, frozen: Tree | None) -> Tree:
    """Return all tensors of a model from its two parts, without a copy, for those who use it as a whole."""
    if isinstance(moving, BlockTree) and moving.factored:
        return joined(frozen or {}, moving)
    return {**frozen, **moving} if frozen else moving


def refuse_other_parts(task: str, model: torch.nn.Module, frozen: Tree) -> None:
    """Raise TaskError if the model trains a parameter that the job has frozen, or the reverse."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad == (name in frozen):
            here, there = ("trained", "frozen") if parameter.requires_grad else ("frozen", "trained")
            raise TaskError(
                f"task {task!r}: parameter {name!r} is {here} here and {there} in the job. Which parameters require "
                "a gradient is fixed when a job is submitted, and must be the same on every device and in every round"
            )


def refuse_moved(task: str, tensors: Tree, frozen: Tree) -> None:
    """Raise TaskError if local training has changed a frozen tensor: the change would not be sent."""
    for name, before in frozen.items():
        if not _same(tensors[name], before):
            raise TaskError(
                f"task {task!r}: local training changed {name!r}, which requires no gradient, so the change would stay "
                "on the device. Make it a buffer (register_buffer): buffers are sent"
            )


def _same(now: Array, before: Array) -> bool:
    """Compare values; NaN equals NaN."""
    if now.flags.c_contiguous and before.flags.c_contiguous:
        flat_now, flat_before = now.reshape(-1).view(np.uint8), before.reshape(-1).view(np.uint8)
        return all(np.array_equal(flat_now[block], flat_before[block]) for block in blocks(flat_now.size))
    return np.asarray(now).tobytes() == np.asarray(before).tobytes()
