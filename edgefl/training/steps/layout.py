"""The memory layout of convolutions: channels last on a CPU, which makes them, and most of all pooling, faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgefl.training.structures import Structure, mapped

if TYPE_CHECKING:
    import torch


def has_channels_last(model: torch.nn.Module) -> bool:
    """Whether a model trains with channels last: on a CPU this makes convolutions, and most of all pooling, faster.

    Not with a GroupNorm whose input may need no gradient, behind frozen layers or as the first one: with channels last,
    the gradient of its weights ends the process (`native_group_norm_backward` of torch 2.13).
    """
    import torch

    kinds = (torch.nn.Conv2d, torch.nn.GroupNorm)
    layers = [one for one in model.modules() if isinstance(one, kinds)]
    if torch.cuda.is_available() or not any(isinstance(one, torch.nn.Conv2d) for one in layers):
        return False
    is_frozen = any(not one.requires_grad for one in model.parameters())
    has_norm = any(isinstance(one, torch.nn.GroupNorm) for one in layers)
    return not (has_norm and (is_frozen or isinstance(layers[0], torch.nn.GroupNorm)))


def lay_out(model: torch.nn.Module) -> None:
    """Store the kernels of a model's convolutions with channels last."""
    import torch

    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def laid_out(inputs: Structure) -> Structure:
    """Return the images (N, C, H, W) among the inputs with channels last; for one channel, this is the same memory."""
    return mapped(_laid_out, inputs)


def _laid_out(inputs: torch.Tensor) -> torch.Tensor:
    import torch

    if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4:
        return inputs
    _, channels, height, width = inputs.shape
    if channels > 1:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs.contiguous().as_strided(inputs.shape, (height * width, 1, width, 1))
