"""Submitting a job in parts: who has which tensors, after the split was tried with the task's own samples."""

from __future__ import annotations

from dataclasses import dataclass

from edgefl.config import TrainConfig
from edgefl.offload.training.model import tried_parts
from edgefl.task import Task
from edgefl.training.local import initial_parameters
from edgefl.trees import Tree
from edgefl.trees.views import joined


@dataclass(frozen=True, kw_only=True, slots=True)
class DividedTensors:
    """A job's first tensors, by who has them."""

    moving: Tree  # that devices send
    others: Tree  # that they do not: the cloud's part, and what is frozen on devices
    on_device: Tree  # frozen on devices
    buffers: tuple[str, ...]  # among the moving ones
    in_cloud: dict[str, str]  # each name that the cloud trains or counts -> one of the same tensor
    cloud_buffers: list[str]


def divided_tensors(task: Task, config: TrainConfig) -> DividedTensors:
    """Return the first tensors of a job in parts.

    Raises ConfigError for cuts that cannot be used, ParityError if the parts compute something else than the model.
    """
    config.split.require_complete()
    tensors = initial_parameters(task, config.seed)
    model, parts = tried_parts(task, config, tensors)
    trees = model.divided(parts, tensors)
    moving = model.moving_in_cloud(parts)
    return DividedTensors(
        moving=trees.moving, others=joined(trees.in_cloud, trees.on_device), on_device=trees.on_device,
        buffers=trees.buffers, in_cloud=model.trained_in_cloud(parts, tensors),
        cloud_buffers=sorted(moving - model.trained),
    )  # fmt: skip
