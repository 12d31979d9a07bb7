"""The inputs and outputs of an ONNX model, in the words of the Open Inference Protocol.

https://github.com/kserve/open-inference-protocol. The agent, the publisher and the cloud use these types.
Invariant: `described` returns only tensors that the agent can serve.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgefl.errors import ProtocolError

_ORT_TYPES: Mapping[str, str] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}
NUMPY_TYPES: Mapping[str, str] = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_SIZE = re.compile(r"-1|\d{1,15}")
# What to do about the types that converters make and the agent does not serve, by how the type's name begins.
_REMEDIES: Mapping[str, str] = {
    "seq(map": (
        "a classifier of scikit-learn: convert it with skl2onnx's options={'zipmap': False}, so that its "
        "probabilities are one tensor"
    ),
    "map": "convert the model so that it returns a tensor",
    "seq": "convert the model so that it returns a tensor, for example by ConcatFromSequence",
    "optional": "make it a plain input or output of the graph",
    "tensor(string)": "encode texts as numbers before the model, and return the indices of classes",
    "tensor(bfloat16)": "cast it to float32 at the edge of the graph",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output as the Open Inference Protocol describes it; -1 = any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    def __str__(self) -> str:
        return f"{self.name} {self.type_text}"

    @property
    def type_text(self) -> str:
        """Datatype and shape in one text, such as FP32[-1,3]."""
        return f"{self.datatype}[{','.join(map(str, self.shape))}]"

    @classmethod
    def parsed(cls, name: str, text: str) -> TensorInfo:
        """Return the tensor of a `type_text`; raises ProtocolError."""
        datatype, _, rest = text.partition("[")
        sizes = [one for one in rest.removesuffix("]").split(",") if one]
        if datatype not in NUMPY_TYPES or not rest.endswith("]") or not all(_SIZE.fullmatch(one) for one in sizes):
            raise ProtocolError(f"tensor {name!r} is described as {text[:80]!r}; expected a text such as FP32[-1,3]")
        return cls(name, datatype, tuple(map(int, sizes)))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape can be this tensor."""
        return len(shape) == len(self.shape) and all(
            there in {-1, size} for size, there in zip(shape, self.shape, strict=True)
        )


def described(who: str, nodes: Iterable[Any]) -> tuple[TensorInfo, ...]:
    """Return a session's inputs or outputs; raises ProtocolError for a type that the agent does not serve."""
    return tuple(_info(who, node) for node in nodes)


def listed(tensors: Iterable[TensorInfo]) -> str:
    """Return tensors as one text for people."""
    return ", ".join(map(str, tensors)) or "none"


def _info(who: str, node: Any) -> TensorInfo:
    datatype = _ORT_TYPES.get(node.type)
    if datatype is None:
        remedy = next((text for begin, text in _REMEDIES.items() if node.type.startswith(begin)), "")
        raise ProtocolError(
            f"{who} has {node.name!r} of type {node.type}; expected: {', '.join(NUMPY_TYPES)}"
            + (f". What to do: {remedy}" if remedy else "")
        )
    shape = tuple(size if isinstance(size, int) and size > 0 else -1 for size in node.shape)
    return TensorInfo(node.name, datatype, shape)
