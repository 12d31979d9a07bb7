"""Converts the Open Inference Protocol's tensors, JSON or binary, to numpy and back.

https://github.com/kserve/open-inference-protocol (REST) and Triton's binary tensor data extension: a body is JSON, or
`Inference-Header-Content-Length` bytes of JSON followed by the raw tensors in the order of the JSON. Anything that
does not fit the model raises ProtocolError with what was seen and what is expected. A null member counts as absent,
since some clients send null for each optional member. In JSON, NaN and infinities become null; binary data keeps them.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edge_agent.serving.json_numbers import read_numbers, write_numbers
from edge_agent.serving.json_request import SMALL_BYTES, UnparsedArray, parse_object
from edgefl.errors import ProtocolError
from edgefl.models.tensors import NUMPY_TYPES, TensorInfo

if TYPE_CHECKING:
    from edgefl.trees import Array

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_ELEMENTS = 16 << 20  # of one tensor, in or out
MAX_OUTPUT_BYTES = 64 << 20  # of the tensors in one response
MAX_JSON_ELEMENTS = 4 << 20  # of one JSON response: twenty bytes or more for each
SMALL_ELEMENTS = 8192  # written as JSON in one or two milliseconds
MAX_ID_CHARS = 1024
MAX_TIMEOUT_US = 60_000_000
MAX_CACHED_BYTES, MAX_CACHED = 4096, 64  # of a cached header; number of cached headers
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can escape it, but UTF-8 cannot encode it


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A request that fits its model."""

    id: str
    feeds: Mapping[str, Array]
    outputs: Mapping[str, bool]  # name -> whether to send it as binary data
    head: CachedHeader | None = None
    timeout_s: float | None = None  # how long it may take; None = it does not say


@dataclass(frozen=True, slots=True)
class InferenceResponse:
    """A response body, and the HTTP headers that describe it."""

    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CachedHeader:
    """The parsed and checked JSON before binary tensors. Clients send the same JSON with each request."""

    outputs: Mapping[str, bool]
    inputs: tuple[tuple[str, Any, int, int, tuple[int, ...]], ...]  # name, dtype, elements, offset, shape
    num_bytes: int  # of JSON and tensors
    timeout_s: float | None
    answers: dict[
        tuple[tuple[int, ...], ...], tuple[bytes, Mapping[str, str]]
    ]  # by output shapes: the JSON and headers of the response

    def read(self, body: bytes) -> InferenceRequest:
        """Return the request in a body that begins with this JSON."""
        import numpy as np

        feeds = {
            name: np.frombuffer(body, dtype, elements, offset).reshape(shape)
            for name, dtype, elements, offset, shape in self.inputs
        }
        return InferenceRequest("", feeds, self.outputs, self, self.timeout_s)


class ServedTensors(Protocol):
    """What requests and responses need of a model: a `LoadedModel`, or one that is placed."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def input_infos(self) -> Mapping[str, TensorInfo]: ...

    @property
    def output_types(self) -> Mapping[str, str]: ...

    @property
    def cached_headers(self) -> dict[bytes, Any]: ...


def is_small_request(body: bytes, header_length: str | None) -> bool:
    """Whether a request can be parsed in the event loop without delaying others."""
    return len(body) <= SMALL_BYTES or (
        header_length is not None and len(header_length) <= len(str(SMALL_BYTES)) and len(body) <= MAX_ELEMENTS
    )


def parse_request(served: ServedTensors, body: bytes, header_length: str | None) -> InferenceRequest:
    """Parse a request for this model; raises ProtocolError."""
    size = _header_size(body, header_length)
    known: CachedHeader | None = (
        served.cached_headers.get(body[:size]) if header_length and size <= MAX_CACHED_BYTES else None
    )
    if known is not None and len(body) == known.num_bytes:
        return known.read(body)
    view = memoryview(body)
    head = parse_object(view[:size])
    feeds = _feeds(served, _objects(head, "inputs"), view[size:])
    request = InferenceRequest(_id(head), feeds, _wanted_outputs(served, head), timeout_s=_timeout_s(head))
    if header_length and size <= MAX_CACHED_BYTES and not request.id:
        _keep(served, body[:size], head["inputs"], request, len(body))
    return request


def _keep(
    served: ServedTensors, text: bytes, tensors: Sequence[Mapping[str, Any]], request: InferenceRequest, num_bytes: int
) -> None:
    """Cache the JSON if all tensors are binary, and of a type in which all bytes are valid values."""
    inputs, offset = [], len(text)
    for tensor in tensors:
        value = request.feeds[tensor["name"]]
        if tensor.get("data") is not None or value.dtype.kind == "b":
            return
        inputs.append((tensor["name"], value.dtype, value.size, offset, value.shape))
        offset += value.nbytes
    if len(served.cached_headers) >= MAX_CACHED:
        served.cached_headers.clear()
    served.cached_headers[text] = CachedHeader(request.outputs, tuple(inputs), num_bytes, request.timeout_s, {})


def is_small_response(request: InferenceRequest, results: Sequence[Array]) -> bool:
    """Whether a response can be written in the event loop without delaying others."""
    return sum(result.size for result in results) <= SMALL_ELEMENTS or all(request.outputs.values())


def encode_response(
    served: ServedTensors, request: InferenceRequest, results: Sequence[Array],
    parameters: Mapping[str, Any] | None = None,
) -> InferenceResponse:  # fmt: skip
    """Encode the results of `request.outputs`, in this order; raises ProtocolError if they are too large.

    `parameters` are those of the response.
    """
    _check_size(request, results)
    if request.head is not None and not parameters and all(request.outputs.values()):
        return _encode_binary(served, request, results, request.head)
    return _encode(served, request, results, parameters)


def _encode_binary(
    served: ServedTensors, request: InferenceRequest, results: Sequence[Array], head: CachedHeader
) -> InferenceResponse:
    """Encode a response whose JSON depends on the shapes only."""
    shapes = tuple(result.shape for result in results)
    known = head.answers.get(shapes)
    if known is None:
        whole = _encode(served, request, results)
        if len(head.answers) < MAX_CACHED:
            head.answers[shapes] = (whole.body[: int(whole.headers[HEADER_LENGTH])], whole.headers)
        return whole
    text, headers = known
    types = served.output_types
    binary = [
        result.astype(NUMPY_TYPES[types[name]], copy=False).tobytes()
        for name, result in zip(request.outputs, results, strict=True)
    ]
    return InferenceResponse(b"".join((text, *binary)), headers)


def _encode(
    served: ServedTensors, request: InferenceRequest, results: Sequence[Array],
    parameters: Mapping[str, Any] | None = None,
) -> InferenceResponse:  # fmt: skip
    outputs: list[str] = []
    binary: list[bytes] = []
    for (name, as_binary), result in zip(request.outputs.items(), results, strict=True):
        datatype = served.output_types[name]
        if as_binary:
            binary.append(result.astype(NUMPY_TYPES[datatype], copy=False).tobytes())
            last: Iterator[str] = iter((f'"parameters":{{"binary_data_size":{len(binary[-1])}}}',))
        else:
            last = iter(('"data":[', *write_numbers(result.reshape(-1)), "]"))
        shape = ",".join(map(str, result.shape))
        outputs.append(f'{{"name":{json.dumps(name)},"datatype":"{datatype}","shape":[{shape}],{"".join(last)}}}')
    own_id = f'"id":{json.dumps(request.id)},' if request.id else ""
    names = f'"model_name":{json.dumps(served.name)},"model_version":"{served.version}"'
    if parameters:
        own_id += f'"parameters":{json.dumps(parameters)},'
    text = f'{{{names},{own_id}"outputs":[{",".join(outputs)}]}}'.encode()
    if not binary:
        return InferenceResponse(text, {"content-type": "application/json"})
    return InferenceResponse(
        b"".join((text, *binary)), {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    )


def _check_size(request: InferenceRequest, results: Sequence[Array]) -> None:
    num_bytes = in_json = 0
    for binary, result in zip(request.outputs.values(), results, strict=True):
        num_bytes += result.nbytes
        in_json += 0 if binary else result.size
    if num_bytes > MAX_OUTPUT_BYTES:
        raise ProtocolError(
            f"the response has {num_bytes} bytes; at most {MAX_OUTPUT_BYTES} are sent. Request fewer rows or outputs"
        )
    if in_json > MAX_JSON_ELEMENTS:
        raise ProtocolError(
            f"the response has {in_json} numbers; at most {MAX_JSON_ELEMENTS} are sent as JSON. "
            "Request binary data (binary_data_output), or fewer rows"
        )


def _header_size(body: bytes, header_length: str | None) -> int:
    if header_length is None:
        return len(body)
    plain = header_length.isascii() and header_length.isdecimal() and len(header_length) <= 18
    if not plain or int(header_length) > len(body):
        raise ProtocolError(f"{HEADER_LENGTH} is {header_length[:40]!r}; the body has {len(body)} bytes")
    return int(header_length)


def _id(head: Mapping[str, Any]) -> str:
    value = head.get("id")
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_ID_CHARS or _SURROGATE.search(value):
        raise ProtocolError(f"'id' is {_shown(value)}; expected a string of at most {MAX_ID_CHARS} characters")
    return value


def _objects(head: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = head.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ProtocolError(f"{key!r} must be a list of objects")
    return value


def _parameters(one: Mapping[str, Any]) -> dict[str, Any]:
    value = one.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ProtocolError("'parameters' must be an object")
    return value


def _timeout_s(head: Mapping[str, Any]) -> float | None:
    """Return the parameter `timeout`, microseconds as in Triton, in seconds; None without one, or for 0."""
    value = _parameters(head).get("timeout")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_TIMEOUT_US:
        raise ProtocolError(f"parameter 'timeout' is {_shown(value)}; expected microseconds, up to {MAX_TIMEOUT_US}")
    return value / 1e6 or None


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ProtocolError(f"parameter {name!r} is {_shown(value)}; expected true or false")
    return value


def _feeds(served: ServedTensors, tensors: Sequence[Mapping[str, Any]], binary: memoryview) -> dict[str, Array]:
    wanted = served.input_infos
    feeds: dict[str, Array] = {}
    for tensor in tensors:
        name = tensor.get("name")
        if not isinstance(name, str) or name not in wanted:
            raise ProtocolError(f"input {_shown(name)} is unknown; model {served.name} takes: {', '.join(wanted)}")
        if name in feeds:
            raise ProtocolError(f"input {name!r} is given twice")
        shape = _checked_shape(wanted[name], tensor)
        size = _parameters(tensor).get("binary_data_size")
        if size is None:
            feeds[name] = _from_json(wanted[name], shape, tensor)
        else:
            if type(size) is not int or not 0 <= size <= len(binary):
                raise ProtocolError(
                    f"input {name!r} declares {_shown(size)} bytes of binary data; {len(binary)} are left"
                )
            if tensor.get("data") is not None:
                raise ProtocolError(f"input {name!r} has data in JSON and {size} bytes of binary data; send one")
            feeds[name] = _from_bytes(wanted[name], shape, binary[:size])
            binary = binary[size:]
    if len(feeds) != len(wanted):
        raise ProtocolError(f"inputs missing: {', '.join(name for name in wanted if name not in feeds)}")
    if len(binary):
        raise ProtocolError(f"the body has {len(binary)} bytes more than its inputs declare")
    return feeds


def _checked_shape(wanted: TensorInfo, tensor: Mapping[str, Any]) -> tuple[int, ...]:
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype != wanted.datatype:
        hint = " (BYTES tensors are not served)" if datatype == "BYTES" else ""
        seen = _shown(datatype, plain=True)
        raise ProtocolError(f"input {wanted.name!r} has datatype {seen}, the model takes {wanted.datatype}{hint}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ProtocolError(f"input {wanted.name!r} has shape {_shown(shape)}, which is not a list of sizes")
    fits = len(shape) == len(wanted.shape) and all(
        there in {-1, size} for size, there in zip(shape, wanted.shape, strict=True)
    )
    if not fits:
        raise ProtocolError(
            f"input {wanted.name!r} has shape {_shown(shape)}, the model takes {list(wanted.shape)} (-1 = any)"
        )
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise ProtocolError(
            f"input {wanted.name!r} has shape {_shown(shape)}: more than {MAX_ELEMENTS} elements. Send fewer rows"
        )
    return tuple(shape)


def _from_bytes(wanted: TensorInfo, shape: tuple[int, ...], data: memoryview) -> Array:
    import numpy as np

    dtype = np.dtype(NUMPY_TYPES[wanted.datatype])
    need = math.prod(shape) * dtype.itemsize
    if len(data) != need:
        raise ProtocolError(
            f"input {wanted.name!r} has {len(data)} bytes of data; shape {list(shape)} of {wanted.datatype} has {need}"
        )
    values = np.frombuffer(data, dtype)
    if dtype.kind == "b" and data.nbytes and values.view("u1").max() > 1:
        raise ProtocolError(f"input {wanted.name!r} contains bytes other than 0 and 1; its datatype is BOOL")
    return values.reshape(shape)


def _from_json(wanted: TensorInfo, shape: tuple[int, ...], tensor: Mapping[str, Any]) -> Array:
    """Convert nested or flat numbers; lossy conversions are refused."""
    data = tensor.get("data")
    try:
        values = read_numbers(data, NUMPY_TYPES[wanted.datatype])
    except ProtocolError as cause:
        raise ProtocolError(f"input {wanted.name!r} cannot be read as {wanted.datatype}: {cause}") from cause
    if values.size != math.prod(shape):
        raise ProtocolError(
            f"input {wanted.name!r} has {values.size} values of data; shape {list(shape)} has {math.prod(shape)}"
        )
    return values.reshape(shape)


def _wanted_outputs(served: ServedTensors, head: Mapping[str, Any]) -> dict[str, bool]:
    default = _flag(_parameters(head), "binary_data_output", default=False)
    known = served.output_types
    asked = _objects(head, "outputs")
    if not asked:
        return dict.fromkeys(known, default)
    wanted: dict[str, bool] = {}
    for output in asked:
        name = output.get("name")
        if not isinstance(name, str) or name not in known:
            raise ProtocolError(f"output {_shown(name)} is unknown; model {served.name} has: {', '.join(known)}")
        if name in wanted:
            raise ProtocolError(f"output {name!r} is requested twice")
        wanted[name] = _flag(_parameters(output), "binary_data", default=default)
    return wanted


def _shown(value: object, *, plain: bool = False) -> str:
    """Return a short representation of any value that a client sent."""
    if isinstance(value, UnparsedArray):
        return "a long array"
    if plain and isinstance(value, str):
        return value[:40]
    return reprlib.repr(value)
