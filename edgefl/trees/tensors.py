"""Convert torch tensors to numpy arrays and back, sharing memory where possible; bfloat16 included.

numpy gets bfloat16 from ml_dtypes, which torch does not know: its bits are passed as 16-bit integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.trees import BFLOAT16, Array, bfloat16

if TYPE_CHECKING:
    import torch


def array_of(tensor: torch.Tensor) -> Array:
    """Return a tensor as an array; raises TypeError for a dtype that numpy does not have."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.bfloat16:
        array: Array = tensor.numpy()
        return array
    return tensor.view(torch.uint16).numpy().view(bfloat16())


def tensor_of(array: Array) -> torch.Tensor:
    """Return an array, in this machine's byte order, as a tensor; raises TypeError for a dtype unknown to torch."""
    import torch

    tensor: Any
    if array.dtype.name != BFLOAT16:
        tensor = torch.from_numpy(array)
    else:
        tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return tensor  # type: ignore[no-any-return]  # torch leaves from_numpy without types
