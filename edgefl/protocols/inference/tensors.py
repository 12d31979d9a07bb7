"""Tensors of the Open Inference Protocol over gRPC, to numpy and back.

A tensor's values are raw bytes (little-endian, row-major), or typed lists of numbers; a message has one form or the
other. FP16 and BF16 exist as raw bytes only. A BYTES tensor is an array of `bytes` objects; its raw form has four
bytes of length before each element. Whatever a peer sends becomes an array or a ProtocolError that says what was
seen and what is expected. Arrays of raw bytes are views of the message: nothing is copied.
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.models.tensors import NUMPY_TYPES, TensorInfo
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.trees import MAX_DIMENSIONS, Array

MAX_ELEMENTS = 256 << 20  # of one tensor
MAX_TENSORS = 256  # of one message
MAX_NAME_CHARS = 1024
_MAX_SIZE = 1 << 40  # of one dimension
_BYTES, _BF16 = "BYTES", "BF16"
DATATYPES = (*NUMPY_TYPES, _BF16, _BYTES)
# The list of a typed tensor, by datatype.
_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the numpy type of a datatype; raises ProtocolError for a name that the protocol does not have."""
    if datatype == _BF16:
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    if datatype == _BYTES:
        return np.dtype(object)
    if datatype not in NUMPY_TYPES:
        raise ProtocolError(f"datatype {_shown(datatype)} is unknown; expected one of: {', '.join(DATATYPES)}")
    return np.dtype(NUMPY_TYPES[datatype])


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the datatype of a numpy type; raises ProtocolError for one that the protocol does not have."""
    if dtype.kind in "OSU":
        return _BYTES
    if dtype.name == "bfloat16":
        return _BF16
    little = dtype.newbyteorder("<")
    for datatype, name in NUMPY_TYPES.items():
        if little == np.dtype(name):
            return datatype
    raise ProtocolError(f"arrays of {dtype} cannot be sent; expected one of: {', '.join(DATATYPES)}")


def request_tensors(request: pb.ModelInferRequest) -> dict[str, Array]:
    """Return the inputs of a request by name; raises ProtocolError."""
    return _tensors("input", request.inputs, request.raw_input_contents)


def response_tensors(response: pb.ModelInferResponse) -> dict[str, Array]:
    """Return the outputs in a response by name; raises ProtocolError."""
    return _tensors("output", response.outputs, response.raw_output_contents)


def make_request(model: str, tensors: Mapping[str, Array], **fields: Any) -> pb.ModelInferRequest:
    """Return a request with raw contents; `fields` are more fields of the message, such as `id`."""
    request = pb.ModelInferRequest(model_name=model, **fields)
    for name, array in tensors.items():
        request.inputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
        request.raw_input_contents.append(encode_raw(array))
    return request


def add_output(response: pb.ModelInferResponse, info: tuple[str, str, Sequence[int]], raw: bytes) -> None:
    """Append an output, as name, datatype and shape, with its raw bytes to a response."""
    name, datatype, shape = info
    response.outputs.add(name=name, datatype=datatype, shape=shape)
    response.raw_output_contents.append(raw)


def encode_raw(array: Array) -> bytes:
    """Return the raw bytes of an array."""
    if array.dtype.kind in "OSU":
        parts = [one.encode() if isinstance(one, str) else bytes(one) for one in array.reshape(-1).tolist()]
        return b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return np.asarray(array, array.dtype.newbyteorder("<")).tobytes()


def decode_raw(who: str, datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """Return the array of raw bytes; raises ProtocolError, in which `who` names the tensor."""
    sizes = checked_shape(who, shape)
    count = math.prod(sizes)
    if datatype == _BYTES:
        return _objects(sizes, _split(who, count, raw))
    dtype = dtype_of(datatype)
    if len(raw) != count * dtype.itemsize:
        raise ProtocolError(
            f"{who} has {len(raw)} bytes of data; shape {list(sizes)} of {datatype} has {count * dtype.itemsize}"
        )
    values = np.frombuffer(raw, dtype)
    if datatype == "BOOL" and count and values.view("u1").max() > 1:
        raise ProtocolError(f"{who} contains bytes other than 0 and 1; its datatype is BOOL")
    return values.reshape(sizes)


def decode_contents(who: str, datatype: str, shape: Sequence[int], contents: pb.InferTensorContents) -> Array:
    """Return the array of a typed list; raises ProtocolError, in which `who` names the tensor."""
    sizes = checked_shape(who, shape)
    dtype = dtype_of(datatype)
    field = _CONTENTS.get(datatype)
    if field is None:
        raise ProtocolError(f"{who} has datatype {datatype}, which has no typed form; send raw_input_contents")
    for other in sorted(set(_CONTENTS.values()) - {field}):
        if len(getattr(contents, other)):
            raise ProtocolError(f"{who} has values in {other}; those of {datatype} belong in {field}")
    values = getattr(contents, field)
    count = math.prod(sizes)
    if len(values) != count:
        raise ProtocolError(f"{who} has {len(values)} values in {field}; shape {list(sizes)} has {count}")
    if datatype == _BYTES:
        return _objects(sizes, values)
    wide = np.array(values, np.int64 if field == "int_contents" else np.uint64 if field == "uint_contents" else dtype)
    if wide.dtype != dtype and count:
        limits = np.iinfo(dtype)
        if wide.min() < limits.min or wide.max() > limits.max:
            raise ProtocolError(f"{who} has values outside {limits.min}..{limits.max}, the range of {datatype}")
    return wide.astype(dtype).reshape(sizes)


def checked_shape(who: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape that an array can have; raises ProtocolError."""
    sizes = tuple(shape)
    if len(sizes) > MAX_DIMENSIONS:
        raise ProtocolError(f"{who} has {len(sizes)} dimensions; expected at most {MAX_DIMENSIONS}")
    if any(not 0 <= size <= _MAX_SIZE for size in sizes) or math.prod(size or 1 for size in sizes) > MAX_ELEMENTS:
        raise ProtocolError(
            f"{who} has shape {_shown(list(sizes))}; expected sizes of 0 or more, and at most {MAX_ELEMENTS} elements"
        )
    return sizes


def check_fits(model: str, infos: Sequence[TensorInfo], tensors: Mapping[str, Array]) -> None:
    """Raise ProtocolError unless these are exactly the inputs of a model, in its datatypes and shapes."""
    by_name = {one.name: one for one in infos}
    unknown = [name for name in tensors if name not in by_name]
    if unknown:
        raise ProtocolError(f"input {_shown(unknown[0])} is unknown; {model} takes: {', '.join(by_name)}")
    missing = [name for name in by_name if name not in tensors]
    if missing:
        raise ProtocolError(f"inputs are missing: {', '.join(missing)}; {model} takes: {', '.join(by_name)}")
    for name, array in tensors.items():
        wanted, datatype = by_name[name], datatype_of(array.dtype)
        if datatype != wanted.datatype:
            raise ProtocolError(f"input {name!r} has datatype {datatype}; {model} takes {wanted.datatype}")
        if not wanted.fits(array.shape):
            raise ProtocolError(
                f"input {name!r} has shape {list(array.shape)}; {model} takes {list(wanted.shape)} (-1 = any size)"
            )


def refuse_nan(tensors: Mapping[str, Array]) -> None:
    """Raise ProtocolError if a value is not a number. Infinities pass: attention masks have them."""
    for name, array in tensors.items():
        if array.dtype.kind != "O" and array.size and array.dtype.kind not in "biu" and bool(np.isnan(array.min())):
            count = int(np.isnan(array).sum())
            raise ProtocolError(
                f"input {_shown(name)} has {count} NaN among its {array.size} values; check what computed them"
            )


def _tensors(kind: str, heads: Sequence[Any], raw: Sequence[bytes]) -> dict[str, Array]:
    if len(heads) > MAX_TENSORS:
        raise ProtocolError(f"the message has {len(heads)} {kind}s; expected at most {MAX_TENSORS}")
    if raw and len(raw) != len(heads):
        raise ProtocolError(f"the message has {len(heads)} {kind}s, and raw contents of {len(raw)}; expected the same")
    tensors: dict[str, Array] = {}
    for number, head in enumerate(heads):
        who = f"{kind} {_shown(head.name)}"
        if not head.name or len(head.name) > MAX_NAME_CHARS:
            raise ProtocolError(f"{who} needs a name of 1 to {MAX_NAME_CHARS} characters")
        if head.name in tensors:
            raise ProtocolError(f"{who} is given twice")
        if "shared_memory_region" in head.parameters:
            raise ProtocolError(f"{who} names a shared memory region, which this server does not have; send its bytes")
        if not raw:
            tensors[head.name] = decode_contents(who, head.datatype, head.shape, head.contents)
        elif head.HasField("contents"):
            raise ProtocolError(f"{who} has typed contents, and the message has raw contents; send one of them")
        else:
            tensors[head.name] = decode_raw(who, head.datatype, head.shape, raw[number])
    return tensors


def _split(who: str, count: int, raw: bytes) -> list[bytes]:
    """Return the elements of a BYTES tensor; each has its length before it."""
    if len(raw) < 4 * count:  # before a list of `count` elements is made
        raise ProtocolError(f"{who} has {len(raw)} bytes of data; {count} elements of BYTES have at least {4 * count}")
    parts, offset = [], 0
    for number in range(count):
        end = offset + 4 + (int.from_bytes(raw[offset : offset + 4], "little") if offset + 4 <= len(raw) else 0)
        if offset + 4 > len(raw) or end > len(raw):
            raise ProtocolError(f"{who} ends within its element {number}; it has {len(raw)} bytes of data")
        parts.append(raw[offset + 4 : end])
        offset = end
    if offset != len(raw):
        raise ProtocolError(f"{who} has {len(raw) - offset} bytes of data after its {count} elements")
    return parts


def _objects(sizes: tuple[int, ...], parts: Iterable[bytes]) -> Array:
    array = np.empty(math.prod(sizes), object)
    array[:] = list(parts)
    return array.reshape(sizes)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
