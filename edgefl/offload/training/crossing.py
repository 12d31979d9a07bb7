"""Values and gradients as bytes, in a job's wire format; gradients in fp16 are scaled by a power of two.

A gradient of a mean over thousands of values is soon below 6e-8, the least that fp16 has. A power of two changes no
digit, and the largest value decides which: Micikevicius et al. 2018, section 3.2, per message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.offload import wire
from edgefl.offload.training.layout import TARGET
from edgefl.training.structures import Structure, leaves
from edgefl.trees import Array
from edgefl.trees.tensors import tensor_of

if TYPE_CHECKING:
    import torch

_TARGET_EXPONENT = 12  # the largest gradient is below 2**13 in fp16, whose largest value is 2**16


def packed(values: Mapping[str, torch.Tensor], form: str) -> bytes:
    """Return values in a wire format, b"" for none; raises ProtocolError for NaN and for what fp16 cannot hold."""
    return wire.encode({name: _array(one) for name, one in values.items()}, form) if values else b""


def packed_targets(targets: Structure) -> bytes:
    """Return a loss's targets, unchanged."""
    return packed({f"{TARGET}.{at}": one for at, one in enumerate(leaves(targets))}, "fp32")


def packed_gradients(gradients: Mapping[str, torch.Tensor], form: str) -> tuple[bytes, float]:
    """Return gradients in a wire format, and the number by which they are multiplied."""
    arrays = {name: _array(one) for name, one in gradients.items()}
    largest = max((float(np.abs(one).max(initial=0.0)) for one in arrays.values()), default=0.0)
    if not math.isfinite(largest):
        raise ProtocolError(f"the gradients of {', '.join(arrays)} are not finite; a lower train.lr may help")
    scale = 1.0
    if form == "fp16" and largest > 0:
        scale = 2.0 ** max(-100, min(100, _TARGET_EXPONENT - math.frexp(largest)[1]))
        arrays = {name: one * one.dtype.type(scale) for name, one in arrays.items()}
    return (wire.encode(arrays, form) if arrays else b""), scale


def unpacked(section: bytes | memoryview, *, scale: float = 1.0, finite: bool = True) -> dict[str, torch.Tensor]:
    """Return the tensors of a section, divided by `scale`; raises ProtocolError, also for infinities if `finite`."""
    if not len(section):
        return {}
    if not (math.isfinite(scale) and scale > 0):
        raise ProtocolError(f"the gradients' scale is {scale}; expected a number above 0")
    found = wire.decode(section)
    for name, one in found.items():
        if finite and one.dtype.kind == "f" and not np.isfinite(one).all():
            raise ProtocolError(f"tensor {name!r} {one.dtype}{list(one.shape)} is not finite")
    return {name: tensor_of(np.require(one / one.dtype.type(scale) if scale != 1.0 else one, requirements="W"))
            for name, one in found.items()}  # fmt: skip


def _array(tensor: torch.Tensor) -> Array:
    import torch

    narrow = tensor.dtype is torch.bfloat16  # the wire has no name for it
    found: Array = (tensor.detach().float() if narrow else tensor.detach()).cpu().contiguous().numpy()
    return found
