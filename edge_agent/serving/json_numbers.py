"""Converts numbers from JSON to numpy and back, exactly or not at all.

Lossy values are refused: a fraction for an integer type, a value outside its type's range. Large arrays are converted
in blocks, so that other threads can run in between. JSON has no NaN and no Infinity: in responses they become null, as
in other servers of this protocol; binary tensor data keeps them.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from edge_agent.serving.json_request import UnparsedArray, parse_array
from edgefl.errors import ProtocolError

if TYPE_CHECKING:
    from edgefl.trees import Array

BLOCK_BYTES = 64 << 10  # of JSON parsed at once
BLOCK_VALUES = 8192  # written at once
MAX_NESTING = 32  # numpy's limit of dimensions
_KINDS: dict[str, set[type]] = {"b": {bool}, "u": {bool, int}, "i": {bool, int}, "f": {bool, int, float}}
_SPACE = b" \t\r\n"


def read_numbers(data: Any, numpy_type: str) -> Array:
    """Return the flat values of nested or flat JSON numbers; raises ProtocolError with the reason."""
    import numpy as np

    dtype = np.dtype(numpy_type)
    if isinstance(data, UnparsedArray):
        parts, rows = [], set()
        for block in _blocks(data.text):
            flat, row = _flat(parse_array(block))
            parts.append(_typed(flat, dtype))
            rows.add(row)
        if len(rows) > 1:
            raise ProtocolError("its rows differ in length")
        return np.concatenate(parts)
    if not isinstance(data, list):
        raise ProtocolError("it has no data" if data is None else "its data is not an array")
    return _typed(_flat(data)[0], dtype)


def write_numbers(values: Array) -> Iterator[str]:
    """Yield the JSON of flat values, piece by piece; NaN and infinities become null."""
    import numpy as np

    infinite = values.dtype.kind == "f" and not np.isfinite(values).all()
    for start in range(0, max(values.size, 1), BLOCK_VALUES):
        block: list[Any] = values[start : start + BLOCK_VALUES].tolist()
        if infinite:
            block = [value if math.isfinite(value) else None for value in block]
        yield ("," if start else "") + json.dumps(block, separators=(",", ":"), allow_nan=False)[1:-1]


def _flat(data: list[Any]) -> tuple[list[Any], tuple[int, ...]]:
    """Return the values of nested lists, and the shape of one row; raises ProtocolError for ragged ones."""
    row: list[int] = []
    while data and type(data[0]) is list:
        width = len(data[0])
        if any(type(one) is not list or len(one) != width for one in data):
            raise ProtocolError("its rows differ in length")
        row.append(width)
        if len(row) >= MAX_NESTING:
            raise ProtocolError("its data is nested too deeply")
        data = list(chain.from_iterable(data))
    return data, tuple(row)


def _typed(values: list[Any], dtype: Any) -> Array:
    import numpy as np

    if dtype.kind == "f":
        return _floats(values, dtype)
    if strange := set(map(type, values)) - _KINDS[dtype.kind]:
        raise _strange(strange)
    if not values:
        return np.empty(0, dtype)
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        if min(values) < bounds.min or max(values) > bounds.max:
            raise ProtocolError("it holds values outside its datatype")
    return np.array(values, dtype)


def _floats(values: list[Any], dtype: Any) -> Array:
    """Convert with `array`: it is faster than numpy and accepts numbers only, where numpy would also parse strings."""
    import numpy as np

    try:
        raw = array("d", values)
    except TypeError as cause:
        raise _strange(set(map(type, values)) - _KINDS["f"]) from cause
    except OverflowError as cause:
        raise ProtocolError("it holds values outside its datatype") from cause
    with np.errstate(over="ignore"):
        typed: Array = np.frombuffer(raw, np.float64).astype(dtype)
    if not np.isfinite(typed).all():
        raise ProtocolError("it holds values outside its datatype")
    return typed


def _strange(types: set[type]) -> ProtocolError:
    return ProtocolError(f"it holds {'null' if type(None) in types else min(one.__name__ for one in types)}")


def _blocks(text: memoryview) -> Iterator[bytes]:
    """Split an array's text between its outermost elements into arrays of about BLOCK_BYTES."""
    whole = bytes(text)
    if len(whole) <= BLOCK_BYTES:
        yield whole
        return
    depth = 0
    head = whole[: MAX_NESTING * 16]
    while (head := head.lstrip(_SPACE))[:1] == b"[":
        depth, head = depth + 1, head[1:]
    border = re.compile(rb"\]\s*" * (depth - 1) + rb",")
    start, last = whole.index(b"[") + 1, len(whole) - 1
    while (found := border.search(whole, start + BLOCK_BYTES, last)) is not None:
        yield b"[" + _whole(whole[start : found.end() - 1]) + b"]"
        start = found.end()
    rest = whole[start:last]
    yield b"[" + (_whole(rest) if start > whole.index(b"[") + 1 else rest) + b"]"


def _whole(block: bytes) -> bytes:
    if not block.strip(_SPACE):  # an extra comma: it would be parsed as an empty array
        raise ProtocolError("the data is not JSON: a value is missing")
    return block
