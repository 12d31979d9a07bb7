"""A training step in two halves: the device's and the cloud's, exact for any number of micro-batches.

The loss of a batch is the mean over its samples; a micro-batch of n of N samples counts n/N of its own mean, so that
accumulated gradients are those of the batch. What crosses is a leaf of the other side's graph, and its gradient comes
back once: what the last part reads of the first one directly is added to what the cloud returns.
Random numbers (dropout) are drawn from (seed, step, micro-batch, part): the same wherever a part runs, and when a step
is repeated. They are not those of unsplit training, which draws them in one sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgefl.offload.training.parts import CLOUD, DEVICE, LAST, ModelParts, Values
from edgefl.offload.training.state import PartState
from edgefl.task import Task, UserCode
from edgefl.training.randomness import seeded
from edgefl.training.steps.descent import loss_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Which micro-batch, for its random numbers, and how much it counts."""

    step: int
    number: int
    share: float  # its samples by those of its batch


@dataclass(kw_only=True, slots=True, eq=False)
class DeviceForward:
    """What the device keeps of a micro-batch until its gradients are back."""

    micro: MicroBatch
    parts: ModelParts
    known: Values  # inputs and what the first part gave
    leaves: Values = field(default_factory=dict)  # of the last part's graph
    loss: torch.Tensor | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class CloudForward:
    """What the cloud keeps of a micro-batch."""

    micro: MicroBatch
    parts: ModelParts
    leaves: Values  # what crossed
    given: Values


class DeviceHalf:
    """The device's layers: the first ones, and the last ones if there is a second cut."""

    def __init__(self, task: Task, state: PartState, seed: int) -> None:
        self._task, self.state, self._seed = task, state, seed

    def forward(self, parts: ModelParts, inputs: Values, micro: MicroBatch, *, trains: bool = True) -> DeviceForward:
        """Run the first part; `trains` says whether gradients of it will be wanted."""
        import torch

        with seeded(_seed(self._seed, micro, DEVICE)), torch.set_grad_enabled(trains), self._user():
            given = parts.parts[DEVICE].run(self.state.tensors, inputs)
        return DeviceForward(micro=micro, parts=parts, known={**inputs, **given})

    @staticmethod
    def crossing(one: DeviceForward) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return what the cloud's part reads, and the names of those whose gradients the device needs."""
        found = {name: one.known[name] for name in one.parts.parts[CLOUD].needs}
        return {name: tensor.detach() for name, tensor in found.items()}, [
            name for name, tensor in found.items() if tensor.requires_grad
        ]

    def last(self, one: DeviceForward, received: Mapping[str, torch.Tensor], targets: Any) -> Values:
        """Run the last part on what the cloud gave, with the loss; return the gradients for the cloud."""
        part = one.parts.parts[LAST]
        one.leaves = {
            name: _leaf(received[name] if name in received else one.known[name], needs_gradient=True)
            for name in part.needs
        }
        with seeded(_seed(self._seed, one.micro, LAST)), self._user():
            given = part.run(self.state.tensors, one.leaves)
            loss = loss_of(self._task, one.parts.outputs({**one.known, **one.leaves, **given}), targets)
        (loss * one.micro.share).backward()  # type: ignore[no-untyped-call]
        one.loss = loss.detach()
        return {name: _gradient(leaf) for name, leaf in one.leaves.items() if name in received and leaf.requires_grad}

    def backward(self, one: DeviceForward, gradients: Mapping[str, torch.Tensor]) -> None:
        """Propagate gradients of what crossed to the first part."""
        import torch

        total: Values = dict(gradients)
        for name, leaf in one.leaves.items():  # read by the last part directly
            if name in one.known and leaf.grad is not None:
                total[name] = total[name] + leaf.grad if name in total else leaf.grad
        ends = [name for name in total if name in one.known and one.known[name].requires_grad]
        if ends:
            torch.autograd.backward([one.known[name] for name in ends], [total[name] for name in ends])

    def _user(self) -> UserCode:
        return UserCode(self._task.name, "split training")


class CloudHalf:
    """The cloud's layers, and the loss if there is no second cut."""

    def __init__(self, task: Task, state: PartState, seed: int) -> None:
        self._task, self.state, self._seed = task, state, seed

    def forward(
        self,
        parts: ModelParts,
        values: Mapping[str, torch.Tensor],
        micro: MicroBatch,
        *,
        differentiable: Collection[str],
    ) -> CloudForward:
        """Run the cloud's part on what crossed."""
        leaves = {name: _leaf(one, needs_gradient=name in differentiable) for name, one in values.items()}
        with seeded(_seed(self._seed, micro, CLOUD)), self._user():
            given = parts.parts[CLOUD].run(self.state.tensors, leaves)
        return CloudForward(micro=micro, parts=parts, leaves=leaves, given=given)

    @staticmethod
    def crossing(one: CloudForward) -> dict[str, torch.Tensor]:
        """Return what the device's last part reads of the cloud's, or the model's outputs need of it."""
        return {name: tensor.detach() for name, tensor in one.given.items()}

    def loss(self, one: CloudForward, targets: Any) -> torch.Tensor:
        """Compute the loss and its gradients; returns the loss, 0-d."""
        with self._user():
            loss = loss_of(self._task, one.parts.outputs({**one.leaves, **one.given}), targets)
        (loss * one.micro.share).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @staticmethod
    def backward(one: CloudForward, gradients: Mapping[str, torch.Tensor]) -> None:
        """Propagate the gradients that the device's last part returned."""
        import torch

        ends = [name for name in gradients if name in one.given and one.given[name].requires_grad]
        if ends:
            torch.autograd.backward([one.given[name] for name in ends], [gradients[name] for name in ends])

    @staticmethod
    def gradients(one: CloudForward) -> Values:
        """Return the gradients of what crossed, for the device."""
        return {name: _gradient(leaf) for name, leaf in one.leaves.items() if leaf.requires_grad}

    def _user(self) -> UserCode:
        return UserCode(self._task.name, "split training")


def _leaf(tensor: torch.Tensor, *, needs_gradient: bool) -> torch.Tensor:
    leaf = tensor.detach()
    return leaf.requires_grad_(needs_gradient and leaf.is_floating_point())


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _seed(seed: int, micro: MicroBatch, part: int) -> int:
    text = f"{seed}/{micro.step}/{micro.number}/{part}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
