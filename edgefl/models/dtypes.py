"""The floating-point types of a model that is exported: what its file computes in, and how exact that is.

float16, float32 and float64 stay as they are. ONNX Runtime has few kernels for bfloat16, so such a model computes in
float32 in its file, where its inputs and outputs are float32, too; its weights stay in bfloat16, half as large.
Invariant: `keep_bfloat16` changes no value of any weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgefl.errors import MissingExtra
from edgefl.trees import Array

if TYPE_CHECKING:
    import torch

# By how much a file may differ from its source, relative to the largest output, or to 1 if all are smaller.
_TOLERANCES: Mapping[str, float] = {
    "torch.bfloat16": 5e-2, "torch.float16": 1e-2, "torch.float32": 1e-4, "torch.float64": 1e-8,
}  # fmt: skip
_SMALL = 64  # elements: not worth a node of the graph


def tolerance_of(model: torch.nn.Module) -> float:
    """Return the tolerance of a model's least exact floating-point type; of float32 if it has none."""
    return max((_TOLERANCES[name] for name in map(str, _dtypes(model)) if name in _TOLERANCES), default=1e-4)


def is_in_bfloat16(model: torch.nn.Module) -> bool:
    """Whether a model has weights in bfloat16."""
    import torch

    return torch.bfloat16 in _dtypes(model)


def other_floats(model: torch.nn.Module) -> str:
    """Return the floating-point types of a model's weights but float32, for a message."""
    names = sorted(str(one).removeprefix("torch.") for one in _dtypes(model) if one.is_floating_point)
    return ", ".join(name for name in names if name != "float32")


def computable(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model itself, or a copy in float32 of one with weights in bfloat16."""
    return copy.deepcopy(model).float() if is_in_bfloat16(model) else model


def computable_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor itself, or in float32 if it is in bfloat16: as a file takes it, or returns it."""
    import torch

    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def array_for_file(tensor: torch.Tensor) -> Array:
    """Return a tensor as an array of the type that an exported file has for it."""
    array: Array = computable_tensor(tensor.detach().cpu()).numpy()
    return array


def keep_bfloat16(path: Path) -> None:
    """Store the weights of a file in bfloat16, if no value changes, each followed by a cast to float32."""
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as cause:
        raise MissingExtra("export to ONNX", "train") from cause
    model = onnx.load(path)
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(weight)
        bits = np.ascontiguousarray(values).view(np.uint32)
        if values.size <= _SMALL or np.any(bits & 0xFFFF):
            continue
        name = weight.name
        half = helper.make_tensor(
            f"{name}.bfloat16", TensorProto.BFLOAT16, list(values.shape), (bits >> 16).astype("<u2").tobytes(), raw=True
        )
        weight.CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def _dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {one.dtype for one in (*model.parameters(), *model.buffers())}
