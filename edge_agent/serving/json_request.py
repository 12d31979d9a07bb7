"""Reads the JSON of a prediction request, strictly, and without holding the interpreter for long.

Python's JSON parser keeps the interpreter's lock from the first byte to the last: 64 MB of numbers would
stop every other thread for a second, and take ten times their size in memory. So in all but the smallest
requests the arrays behind `"data":` are cut out first, and read block by block into numpy
(`edge_agent.serving.json_numbers`), by a parser that is quick with numbers.
Strict: NaN and Infinity are no JSON (RFC 8259), and a member that is named twice is ambiguous.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from edgefl.errors import ProtocolError

SMALL_BYTES = 64 << 10  # parsed in one go, in well under a millisecond
CUT_BYTES = 2 << 10  # from here on an array is cut out, and read by a parser that is quick with numbers
MAX_HEAD_BYTES = 1 << 20  # of a request without the numbers that were cut out
_DATA = b'"data"'
_OPENS = re.compile(rb"\s*:\s*(?=\[)")


class Cut:
    """An array of numbers that was cut out of a large request: its JSON text, not read yet."""

    def __init__(self, text: memoryview) -> None:
        self.text = text


def parse_object(body: memoryview) -> dict[str, Any]:
    """Return the object that a request is; long arrays behind `"data":` are a `Cut`. Raises ProtocolError."""
    text, cuts = (bytes(body), []) if len(body) <= CUT_BYTES else _cut(body)
    if len(text) > MAX_HEAD_BYTES:
        raise ProtocolError(
            f"the request has {len(text)} bytes of JSON beside its tensors' data; at most {MAX_HEAD_BYTES} are allowed"
        )
    try:
        head = (_decoder(iter(cuts)) if cuts else _STRICT).decode(text.decode())
    except RecursionError as cause:
        raise ProtocolError("the request's JSON is nested too deeply") from cause
    except ProtocolError:
        raise
    except ValueError as cause:
        raise ProtocolError(f"the request is not JSON: {cause}") from cause
    if not isinstance(head, dict):
        raise ProtocolError(f"the request is a JSON {type(head).__name__}, not an object")
    return head


def parse_array(text: bytes) -> list[Any]:
    """Return the array that a text is; raises ProtocolError."""
    try:
        value = _quickly(text) or _STRICT.decode(text.decode())
    except RecursionError as cause:
        raise ProtocolError("the data is nested too deeply") from cause
    except ProtocolError:
        raise
    except ValueError as cause:
        raise ProtocolError(f"the data is not JSON: {cause}") from cause
    if not isinstance(value, list):
        raise ProtocolError(f"the data is a JSON {type(value).__name__}, not an array")
    return value


def _quickly(text: bytes) -> Any:
    """Read numbers five times faster than Python's own parser, to the same bit; None where that one is to decide."""
    try:
        from pydantic_core import from_json
    except ImportError:  # no wheel for this machine
        return None
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return None


def _cut(body: memoryview) -> tuple[bytes, list[Cut]]:
    """Return the text with NaN in place of every array behind `"data":`, and those arrays.

    `"data"` followed by a colon is a key wherever it stands: inside a string its quotes would be escaped.
    An array of numbers holds neither quotes nor braces, so it ends at the last bracket before the next of either.
    """
    whole = bytes(body)
    parts, cuts, kept, at = [], [], 0, whole.find(_DATA)
    while at >= 0:
        start = _OPENS.match(whole, at + len(_DATA))
        if start is None:
            at = whole.find(_DATA, at + len(_DATA))
            continue
        ends = [end for end in (whole.find(mark, start.end()) for mark in (b'"', b"}")) if end >= 0]
        end = whole.rfind(b"]", start.end(), min(ends, default=len(whole))) + 1
        if end <= start.end():  # strings, or no end: the parser says what is wrong
            at = start.end()
            at = whole.find(_DATA, at)
            continue
        parts += [whole[kept : start.end()], b"NaN"]
        cuts.append(Cut(memoryview(whole)[start.end() : end]))
        kept, at = end, whole.find(_DATA, end)
    return b"".join((*parts, whole[kept:])), cuts


def _constant(name: str, waiting: Iterator[Cut]) -> Cut:
    """Put the arrays that were cut out back in their places; there is no other NaN in JSON."""
    cut = next(waiting, None) if name == "NaN" else None
    if cut is None:
        raise ProtocolError(f"the request holds {name}, which is not JSON; send such values as binary tensor data")
    return cut


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ProtocolError(f"the request names the member {twice[:80]!r} twice")
    return members


def _decoder(waiting: Iterator[Cut]) -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=lambda name: _constant(name, waiting), object_pairs_hook=_object)


_STRICT = _decoder(iter(()))  # making one takes longer than reading a small request
