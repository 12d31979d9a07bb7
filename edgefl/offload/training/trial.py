"""A split is tried before it is used: one step's loss and gradients in parts, against the whole model's.

On the operator's machine, where the whole model is. Without random layers: dropout draws other numbers in parts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgefl.config import TrainConfig
from edgefl.errors import ParityError
from edgefl.offload.training.halves import CloudHalf, DeviceForward, DeviceHalf, MicroBatch
from edgefl.offload.training.parts import ModelParts
from edgefl.offload.training.state import PartState
from edgefl.offload.training.traced import input_values, one_name_each
from edgefl.task import Task
from edgefl.training.local import buffer_names, tree_of
from edgefl.training.steps.descent import loss_of
from edgefl.training.structures import Structure, call

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-5  # of the largest gradient: float32, added in another order


def halves_of(
    task: Task, model: torch.nn.Module, parts: ModelParts, config: TrainConfig
) -> tuple[DeviceHalf, CloudHalf]:
    """Return both halves of a model with its current tensors, in one process."""
    tensors, names = tree_of(task, model, list(model.state_dict())), one_name_each(model)
    trained = {names[name] for name, one in model.named_parameters() if one.requires_grad}
    buffers = set(buffer_names(task))
    device, cloud = (
        PartState(task, side, tensors, trained=trained, buffers=buffers, config=config)
        for side in (parts.of_device(), parts.of_cloud())
    )
    return DeviceHalf(task, device, config.seed), CloudHalf(task, cloud, config.seed)


def take_step(
    device: DeviceHalf, cloud: CloudHalf, batch: Iterable[tuple[MicroBatch, ModelParts, Structure, Structure]]
) -> float:
    """Take a step of both halves without a link between them; return the batch's loss."""
    total, loss = 0.0, None
    for micro, parts, inputs, targets in batch:
        loss = accumulate(device, cloud, micro, parts, inputs, targets)
        total += micro.share * float(loss)
    if loss is not None:
        for half in (device, cloud):
            half.state.step(loss)
    return total


def accumulate(
    device: DeviceHalf, cloud: CloudHalf, micro: MicroBatch, parts: ModelParts, inputs: Structure, targets: Structure
) -> torch.Tensor:
    """Accumulate a micro-batch's gradients in both halves; return its loss, 0-d."""
    here: DeviceForward = device.forward(parts, input_values(inputs), micro)
    values, differentiable = device.crossing(here)
    there = cloud.forward(parts, values, micro, differentiable=differentiable)
    if parts.has_last:
        cloud.backward(there, device.last(here, cloud.crossing(there), targets))
    else:
        here.loss = cloud.loss(there, targets)
    device.backward(here, cloud.gradients(there))
    if here.loss is None:
        raise RuntimeError("a micro-batch ended without a loss")
    return here.loss


def check_parts(task: Task, model: torch.nn.Module, parts: ModelParts, inputs: Structure, targets: Structure) -> float:
    """Return by how much the parts' gradients differ from the model's, relative to the largest.

    Raises ParityError above TOLERANCE. The model is not changed.
    """
    import torch

    model = _without_chance(copy.deepcopy(model).train())
    plain = TrainConfig(epochs=1, lr=1.0)
    device, cloud = halves_of(task, model, parts, plain)
    loss = loss_of(task, call(model, inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    found = accumulate(device, cloud, MicroBatch(step=0, number=0, share=1.0), parts, inputs, targets)
    tensors = {**device.state.tensors, **cloud.state.tensors}
    pairs = [(one.grad, tensors[name].grad) for name, one in model.named_parameters() if name in tensors]
    known = [(whole, torch.zeros_like(whole) if part is None else part) for whole, part in pairs if whole is not None]
    largest = max((float(one.abs().max()) for one, _ in known), default=0.0)
    off = max((float((one - other).abs().max()) for one, other in known), default=0.0) / max(largest, 1e-12)
    off = max(off, abs(float(found) - float(loss.detach())) / max(abs(float(loss.detach())), 1e-12))
    if not off <= TOLERANCE:
        raise ParityError(
            f"{type(model).__name__}: a step in parts differs from the whole model's by {off:.1e} of the largest "
            f"gradient; allowed: {TOLERANCE:g}. Cut it elsewhere"
        )
    return off


def _without_chance(model: torch.nn.Module) -> torch.nn.Module:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the base of all kinds
            module.p = 0.0
    return model
