"""A local training step: a batch's gradients, then the task's optimizer, else plain SGD.

FedProx (Li et al. 2020): the gradient of mu/2 * ||w - w0||^2 is added to the loss's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.task import Task, UserCode
from edgefl.training.steps.layout import has_channels_last, laid_out
from edgefl.training.steps.optimizer_state import optimizer_state, restore_optimizer
from edgefl.training.structures import Structure, call
from edgefl.trees import Array, Tree

if TYPE_CHECKING:
    import torch


class BatchGradient(Protocol):
    """How a batch's gradients are computed."""

    @property
    def trained(self) -> Sequence[torch.nn.Parameter]:
        """The parameters that are trained."""

    def __call__(self, inputs: Structure, targets: Structure) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
        """Return the gradients of `trained` (None if the loss does not depend on a parameter), and the loss, 0-d."""


class Autograd:
    """Gradients by torch's autograd."""

    def __init__(self, task: Task, model: torch.nn.Module) -> None:
        self._task, self._model, self._channels_last = task, model, has_channels_last(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, inputs: Structure, targets: Structure) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
        import torch

        outputs = call(self._model, laid_out(inputs) if self._channels_last else inputs)
        loss = loss_of(self._task, outputs, targets)
        return torch.autograd.grad(loss, self.trained, allow_unused=True), loss.detach()


class Descent:
    """Takes steps with a batch's gradients: by the task's optimizer, else w <- w - lr * g.

    `before` is the state of the client's optimizer after its former training, see `optimizer_state`; set it before each
    client.
    """

    def __init__(self, task: Task, gradient: BatchGradient, before: Tree | None = None) -> None:
        self._task, self._gradient, self.before = task, gradient, before
        self._optimizer: torch.optim.Optimizer | None = None

    def begin(self, config: TrainConfig) -> None:
        """Start a client's training from the model's current parameters, with a new optimizer."""
        trained = self._gradient.trained
        self._mu = config.proximal_mu
        self._anchors = [parameter.detach().clone() for parameter in trained] if self._mu else []
        if self._task.optimizer is None:
            self._step = _plain(trained, config.lr)
            return
        self._optimizer = optimizer = self._task.optimizer_of(trained, config)
        if self.before:
            restore_optimizer(optimizer, trained, self.before)
        self._step = _chosen(optimizer, trained)

    def pull_to(self, other: Descent) -> None:
        """Pull to where another training of the same parameters began (FedProx), which this one continues."""
        self._anchors = other._anchors

    def kept(self) -> dict[str, Array]:
        """Return the optimizer's state after the training; empty for plain SGD."""
        if self._optimizer is None:
            return {}
        with UserCode(self._task.name, "the state of its optimizer"):
            return optimizer_state(self._optimizer, self._gradient.trained)

    def take(self, inputs: Structure, targets: Structure) -> torch.Tensor:
        """Take a step in place; returns the batch's loss before it, 0-d."""
        gradients, loss = self._gradient(inputs, targets)
        self._step(_pulled(gradients, self._gradient.trained, self._anchors, self._mu) if self._mu else gradients)
        return loss


_Step = Callable[[Sequence["torch.Tensor | None"]], None]  # takes one step with the gradients of the trained


def _plain(trained: Sequence[torch.nn.Parameter], lr: float) -> _Step:
    """Return the step w <- w - lr * g, which is faster than torch.optim.SGD, and whose import takes no second."""
    import torch

    tensors = [parameter.data for parameter in trained]

    def step(gradients: Sequence[torch.Tensor | None]) -> None:
        moved = [(one, grad) for one, grad in zip(tensors, gradients, strict=True) if grad is not None]
        if moved:
            torch._foreach_add_(*map(list, zip(*moved, strict=True)), alpha=-lr)

    return step


def _chosen(optimizer: torch.optim.Optimizer, trained: Sequence[torch.nn.Parameter]) -> _Step:
    """Return the step of the task's own optimizer."""

    def step(gradients: Sequence[torch.Tensor | None]) -> None:
        for parameter, grad in zip(trained, gradients, strict=True):
            parameter.grad = grad
        optimizer.step()

    return step


def _pulled(
    gradients: Sequence[torch.Tensor | None], trained: Sequence[torch.nn.Parameter], anchors: Sequence[torch.Tensor],
    mu: float,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Return the gradients plus the gradient of mu/2 * ||w - w0||^2."""
    terms = [mu * (parameter.detach() - anchor) for parameter, anchor in zip(trained, anchors, strict=True)]
    return [term if grad is None else grad + term for grad, term in zip(gradients, terms, strict=True)]


def loss_of(task: Task, outputs: Structure, targets: Structure) -> torch.Tensor:
    """Return the loss of a batch, 0-d; raises TaskError if it is not a single number."""
    import torch

    if task.loss is None:
        raise TaskError(f"task {task.name!r} has no loss")
    loss = task.loss(outputs, targets)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        seen = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskError(f"task {task.name!r}: loss returned {seen}; expected one number, the mean over the batch")
    return loss.reshape(())
