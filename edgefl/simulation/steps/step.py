"""The API of training steps: `make_step` for one client at a time, `make_stacked_step` for many as one computation.

The caller decides whether steps are recorded. How recorded steps are made fast (simplified graphs, factored
gradients) is internal to this folder. Without recording, autograd computes each step, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgefl.simulation.steps.factored import FactoredGradients, unfactored
from edgefl.simulation.steps.recording import RecordedDescent, RecordedFunction, RecordedGradient
from edgefl.task import Task
from edgefl.training.steps.descent import Autograd, Descent

if TYPE_CHECKING:
    import torch

StackedStep = Callable[..., FactoredGradients]  # (parameters and a batch, each with a leading dimension K)


def make_step(task: Task, model: torch.nn.Module, *, recorded: bool = True, compiled: bool = False) -> Descent:
    """Return the training step of a task on this model. The model's tensors must not move while it is used.

    A recorded plain SGD step equals a device's up to rounding; with an optimizer or a proximal term, bit for bit.
    """
    if not recorded:
        return Descent(task, Autograd(task, model))
    return RecordedDescent(task, RecordedGradient(task, model, compiled=compiled))


def make_stacked_step(
    task: Task, function: Callable[..., tuple[Any, ...]], num_parameters: int, *, recorded: bool = True,
    compiled: bool = False,
) -> StackedStep:  # fmt: skip
    """Return the step of a stack of clients: a function that returns gradients, (K, ...) each, and losses, (K,).

    `function` is pure. It takes `num_parameters` tensors and a batch, and returns as many gradients and the losses.
    """
    if recorded:
        return RecordedFunction(task.name, function, num_parameters, compiled=compiled)

    def step(*tensors: Any) -> FactoredGradients:
        return FactoredGradients(function(*tensors), unfactored(num_parameters))

    return step
