"""The Open Inference Protocol's tensors, as JSON and as binary data, from and to numpy.

https://github.com/kserve/open-inference-protocol (REST) and Triton's binary tensor data extension:
a body is JSON, or JSON of `Inference-Header-Content-Length` bytes and then the tensors' raw bytes in
the order in which the JSON names them. Everything that does not fit the model raises ProtocolError,
which says what was seen and what is wanted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_agent.sessions import NUMPY_TYPES, Served, TensorInfo
from edgefl.errors import ProtocolError

if TYPE_CHECKING:
    from edgefl.trees import Array

HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Request:
    """A request that fits its model."""

    id: str
    feeds: Mapping[str, Array]
    outputs: Mapping[str, bool]  # name -> whether it is wanted as binary data


@dataclass(frozen=True, slots=True)
class Response:
    """A body, and the headers that say how to read it."""

    body: bytes
    headers: Mapping[str, str]


def parse_request(served: Served, body: bytes, header_length: str | None) -> Request:
    """Read a request for this model; raises ProtocolError."""
    size = _header_size(body, header_length)
    try:
        head = json.loads(body[:size])
    except ValueError as cause:
        raise ProtocolError(f"the request is not JSON: {cause}") from cause
    if not isinstance(head, dict):
        raise ProtocolError(f"the request is a JSON {type(head).__name__}, not an object")
    feeds = _feeds(served, _objects(head, "inputs"), memoryview(body)[size:])
    return Request(str(head.get("id", "")), feeds, _wanted_outputs(served, head))


def encode_response(served: Served, request: Request, results: Sequence[Array]) -> Response:
    """Write the results of `request.outputs`, in its order."""
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for (name, as_binary), result in zip(request.outputs.items(), results, strict=True):
        datatype = next(one.datatype for one in served.outputs if one.name == name)
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(result.shape)}
        if as_binary:
            binary.append(result.astype(NUMPY_TYPES[datatype], copy=False).tobytes())
            output["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            output["data"] = result.reshape(-1).tolist()
        outputs.append(output)
    head: dict[str, Any] = {"model_name": served.name, "model_version": str(served.version), "outputs": outputs}
    if request.id:
        head["id"] = request.id
    text = json.dumps(head, separators=(",", ":")).encode()
    if not binary:
        return Response(text, {"content-type": "application/json"})
    return Response(
        b"".join((text, *binary)), {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    )


def _header_size(body: bytes, header_length: str | None) -> int:
    if header_length is None:
        return len(body)
    if not header_length.isdecimal() or int(header_length) > len(body):
        raise ProtocolError(f"{HEADER_LENGTH} is {header_length!r}; the body has {len(body)} bytes")
    return int(header_length)


def _objects(head: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = head.get(key, [])
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ProtocolError(f"{key!r} must be a list of objects")
    return value


def _parameters(one: Mapping[str, Any]) -> dict[str, Any]:
    value = one.get("parameters", {})
    if not isinstance(value, dict):
        raise ProtocolError("'parameters' must be an object")
    return value


def _feeds(served: Served, tensors: Sequence[Mapping[str, Any]], binary: memoryview) -> dict[str, Array]:
    wanted = {one.name: one for one in served.inputs}
    feeds: dict[str, Array] = {}
    for tensor in tensors:
        name = tensor.get("name")
        if name not in wanted or name in feeds:
            fault = "is given twice" if name in feeds else "is unknown"
            raise ProtocolError(f"input {name!r} {fault}; model {served.name} takes: {', '.join(wanted)}")
        shape = _checked_shape(wanted[name], tensor)
        size = _parameters(tensor).get("binary_data_size")
        if size is None:
            feeds[name] = _from_json(wanted[name], shape, tensor)
        else:
            if not isinstance(size, int) or not 0 <= size <= len(binary):
                raise ProtocolError(f"input {name!r} says {size!r} bytes of binary data; {len(binary)} are left")
            feeds[name] = _from_bytes(wanted[name], shape, binary[:size])
            binary = binary[size:]
    if missing := [name for name in wanted if name not in feeds]:
        raise ProtocolError(f"inputs missing: {', '.join(missing)}")
    if len(binary):
        raise ProtocolError(f"the body has {len(binary)} bytes more than its inputs say")
    return feeds


def _checked_shape(wanted: TensorInfo, tensor: Mapping[str, Any]) -> tuple[int, ...]:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype != wanted.datatype:
        hint = " (BYTES tensors are not served)" if datatype == "BYTES" else ""
        raise ProtocolError(f"input {wanted.name!r} has datatype {datatype}, the model takes {wanted.datatype}{hint}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ProtocolError(f"input {wanted.name!r} has shape {shape!r}, which is no list of sizes")
    fits = len(shape) == len(wanted.shape) and all(
        there in {-1, size} for size, there in zip(shape, wanted.shape, strict=True)
    )
    if not fits:
        raise ProtocolError(f"input {wanted.name!r} has shape {shape}, the model takes {list(wanted.shape)} (-1 = any)")
    return tuple(shape)


def _from_bytes(wanted: TensorInfo, shape: tuple[int, ...], data: memoryview) -> Array:
    import numpy as np

    dtype = np.dtype(NUMPY_TYPES[wanted.datatype])
    need = math.prod(shape) * dtype.itemsize
    if len(data) != need:
        raise ProtocolError(
            f"input {wanted.name!r} has {len(data)} bytes of data; shape {list(shape)} of {wanted.datatype} has {need}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _from_json(wanted: TensorInfo, shape: tuple[int, ...], tensor: Mapping[str, Any]) -> Array:
    """Read nested or flat numbers; nothing is cast that would lose something."""
    import numpy as np

    dtype = np.dtype(NUMPY_TYPES[wanted.datatype])
    try:
        raw = np.asarray(tensor.get("data"))
        if raw.size and raw.dtype.kind not in {"b": "b", "u": "bui", "i": "bui", "f": "buif"}[dtype.kind]:
            raise ProtocolError(f"input {wanted.name!r} holds {raw.dtype.name} data; its datatype is {wanted.datatype}")
        if raw.size != math.prod(shape):
            raise ProtocolError(
                f"input {wanted.name!r} has {raw.size} values of data; shape {list(shape)} has {math.prod(shape)}"
            )
        values = raw.astype(dtype)
    except (ValueError, OverflowError) as cause:
        if isinstance(cause, ProtocolError):
            raise
        raise ProtocolError(f"input {wanted.name!r} cannot be read as {wanted.datatype}: {cause}") from cause
    if dtype.kind in "iu" and raw.size and not np.array_equal(values, raw):
        raise ProtocolError(f"input {wanted.name!r} holds values outside {wanted.datatype}")
    return values.reshape(shape)


def _wanted_outputs(served: Served, head: Mapping[str, Any]) -> dict[str, bool]:
    default = bool(_parameters(head).get("binary_data_output", False))
    known = [one.name for one in served.outputs]
    asked = _objects(head, "outputs")
    for output in asked:
        if output.get("name") not in known:
            raise ProtocolError(
                f"output {output.get('name')!r} is unknown; model {served.name} has: {', '.join(known)}"
            )
    if not asked:
        return dict.fromkeys(known, default)
    return {str(output["name"]): bool(_parameters(output).get("binary_data", default)) for output in asked}
