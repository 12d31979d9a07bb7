"""Gradients of a batch that several processes share: by DDP, or by FSDP2 for a model that one device cannot hold.

Both average the processes' gradients. A process has `share` of the batch's samples, so its loss, a mean over these, is
multiplied by share * processes: then the average is the gradient of the mean over the batch, also for uneven shares,
and for a process without any (it computes on samples of another, multiplied by 0).
DDP: Li et al. 2020, PyTorch Distributed. FSDP2: `torch.distributed.fsdp.fully_shard`.
Invariant: gradients are those of one process with the complete batch, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training.steps.descent import loss_of
from edgefl.training.steps.layout import has_channels_last, laid_out
from edgefl.training.structures import Structure, arguments

if TYPE_CHECKING:
    import torch


class SharedGradient:
    """The gradient of a batch, and this process's part of its loss. Set `share` before each batch."""

    def __init__(self, task: Task, model: torch.nn.Module, *, strategy: str, size: int) -> None:
        self._task, self.model, self._size = task, model, size
        self._channels_last = has_channels_last(model)
        self._sharded = strategy == "fsdp"
        self.share = 1.0
        self._wrapped = _fully_sharded(task, model) if self._sharded else _replicated(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def __call__(self, inputs: Structure, targets: Structure) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
        """Return the gradients of `trained`, and share * loss, 0-d."""
        for parameter in self.trained:
            parameter.grad = None
        loss = self._backward(self._wrapped, inputs, targets, self._size)
        return [parameter.grad for parameter in self.trained], loss

    def accumulate(self, inputs: Structure, targets: Structure) -> torch.Tensor:
        """Add the gradients to those that the parameters have; returns share * loss, 0-d. Ends with `sum_up`."""
        return self._backward(self.model, inputs, targets, self._size if self._sharded else 1)

    def sum_up(self) -> None:
        """Add up the accumulated gradients of all processes; those of a sharded model are added up already."""
        import torch
        import torch.distributed as dist

        for parameter in () if self._sharded else self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def outputs(self, inputs: Structure, model: torch.nn.Module | None = None) -> Structure:
        """Return the model's outputs."""
        inputs = laid_out(inputs) if self._channels_last else inputs
        positional, named = arguments(self.model, inputs)
        return (model or self.model)(*positional, **named)

    def _backward(self, model: torch.nn.Module, inputs: Structure, targets: Structure, scale: int) -> torch.Tensor:
        loss = loss_of(self._task, self.outputs(inputs, model), targets) * self.share
        (loss * scale).backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
        return loss.detach()


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the state dict, one complete tensor at a time; all processes of a sharded model take part."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Return a complete gradient."""
    return gradient.full_tensor() if gradient is not None and hasattr(gradient, "full_tensor") else gradient


def _replicated(model: torch.nn.Module) -> torch.nn.Module:
    import torch

    # A parameter may be used in some batches only, or in none, as in one process.
    wrapped: torch.nn.Module = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return wrapped


def _fully_sharded(task: Task, model: torch.nn.Module) -> torch.nn.Module:
    """Shard the blocks in a model's ModuleLists one by one, then the rest; on the GPU, if there is one."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not any(True for _ in model.parameters()):
        raise TaskError(f"task {task.name!r}: its model has no parameters, so train.strategy='fsdp' has none to shard")
    device: Any = torch.accelerator.current_accelerator() or torch.device("cpu")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    try:
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleList):
                for block in module:
                    fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    except (ValueError, RuntimeError, AssertionError, NotImplementedError) as cause:
        raise TaskError(f"task {task.name!r}: its model cannot be sharded by FSDP: {cause}") from cause
    return model
