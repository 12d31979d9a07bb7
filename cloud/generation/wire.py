"""The protocol between the stage server and a tail's process: messages over a socket pair, each a header and bytes.

uint32 length of the header, uint32 length of the bytes (little-endian), the header, the bytes

process: TailUp      the stage is loaded
TailNotLoaded  it cannot be loaded
server:  RunStep     compute rows of several sequences; their hidden states are the bytes, one after the other
process: StepDone    the token of each, or why there is none

A header begins with its kind. Those that are sent for each token are records of fixed size, the others JSON: between
two steps the processors' caches hold weights, not code, and what is done there delays every token.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from edgefl.errors import ProtocolError

HEAD = struct.Struct("<II")
MAX_HEADER_BYTES, MAX_BODY_BYTES = 4 << 20, 256 << 20
MAX_ERROR_CHARS = 2000
_DATATYPES = ("FP32", "FP16", "BF16")  # their numbers in an item
_RUN, _DONE = b"R", b"D"
_STEP = struct.Struct("<cQII")  # kind, number, items, sequences to drop
_ITEM = struct.Struct("<QIBII?ddQ")  # the fields of StepItem in their order
_RESULT = struct.Struct("<cQId?")  # kind, number, items, seconds, lacks_memory
_NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class TailUp:
    """The stage is loaded."""

    pid: int
    digest: str = ""  # of the stage
    kind: str = "up"


@dataclass(frozen=True, kw_only=True, slots=True)
class TailNotLoaded:
    """The stage cannot be loaded."""

    error: str
    kind: str = "failed"


class StepItem(NamedTuple):
    """Some next rows of one sequence."""

    key: int
    num: int  # rows
    datatype: str  # FP32, FP16 or BF16
    position: int  # tokens before them; 0 begins the sequence again
    room: int  # tokens that the sequence will have at most
    wants_token: bool
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class RunStep(NamedTuple):
    """Compute a step, after the caches of the sequences in `drop` are freed."""

    step: int
    items: Sequence[StepItem]
    drop: Sequence[int] = ()


class StepDone(NamedTuple):
    """The results of a step, in the order of its items: a token or None, and what went wrong or nothing."""

    step: int
    tokens: Sequence[int | None]
    errors: Sequence[str]
    lacks_memory: bool = False
    seconds: float = 0.0


Message = TailUp | TailNotLoaded | RunStep | StepDone
_KINDS: Mapping[str, type[Any]] = {"up": TailUp, "failed": TailNotLoaded}


def packed(message: Message, body: bytes = b"") -> bytes:
    """Encode a message."""
    match message:
        case RunStep():
            header = _packed_step(message)
        case StepDone():
            header = _packed_result(message)
        case _:
            header = json.dumps(dataclasses.asdict(message), separators=(",", ":")).encode()
    return b"".join((HEAD.pack(len(header), len(body)), header, body))


def sizes_of(head: bytes) -> tuple[int, int]:
    """Return the lengths of header and bytes; raises ProtocolError."""
    header, body = HEAD.unpack(head)
    if header > MAX_HEADER_BYTES or body > MAX_BODY_BYTES:
        raise ProtocolError(f"a message between server and tail has a header of {header} and {body} bytes")
    return header, body


def parse_header(data: bytes) -> Message:
    """Decode a header; raises ProtocolError."""
    try:
        match data[:1]:
            case b"R":
                return _parsed_step(data)
            case b"D":
                return _parsed_result(data)
        value = json.loads(data)
        message: Message = _word(_KINDS[value["kind"]](**value))
    except (ValueError, LookupError, TypeError, RecursionError, struct.error) as cause:
        raise ProtocolError(f"not a message between server and tail: {data[:80]!r}") from cause
    return message


def _word(message: TailUp | TailNotLoaded) -> TailUp | TailNotLoaded:
    """Return a message that was JSON; raises TypeError for values of other types."""
    for one in dataclasses.fields(message):
        if type(getattr(message, one.name)) is not (int if one.name == "pid" else str):
            raise TypeError(one.name)
    return message


def _packed_step(step: RunStep) -> bytes:
    items = [
        _ITEM.pack(key, num, _DATATYPES.index(datatype), *rest) for key, num, datatype, *rest in step.items
    ]  # fmt: skip
    head = _STEP.pack(_RUN, step.step, len(items), len(step.drop))
    return b"".join((head, *items, struct.pack(f"<{len(step.drop)}Q", *step.drop)))


def _parsed_step(data: bytes) -> RunStep:
    _, number, num_items, num_drop = _STEP.unpack_from(data)
    ends = _STEP.size + num_items * _ITEM.size
    items = [
        StepItem(key, num, _DATATYPES[datatype], *rest)
        for key, num, datatype, *rest in _ITEM.iter_unpack(data[_STEP.size : ends])
    ]
    drop = list(struct.unpack(f"<{num_drop}Q", data[ends:]))
    if len(items) != num_items:
        raise ValueError(f"{len(items)} items, expected {num_items}")
    return RunStep(number, items, drop)


def _packed_result(done: StepDone) -> bytes:
    tokens = (_NO_TOKEN if one is None else one for one in done.tokens)
    head = _RESULT.pack(_DONE, done.step, len(done.tokens), done.seconds, done.lacks_memory)
    errors = json.dumps(done.errors).encode() if any(done.errors) else b""
    return b"".join((head, struct.pack(f"<{len(done.tokens)}q", *tokens), errors))


def _parsed_result(data: bytes) -> StepDone:
    _, number, num, seconds, lacks_memory = _RESULT.unpack_from(data)
    ends = _RESULT.size + 8 * num
    tokens = [None if one == _NO_TOKEN else one for one in struct.unpack(f"<{num}q", data[_RESULT.size : ends])]
    errors = json.loads(data[ends:]) if ends < len(data) else [""] * num
    if len(errors) != num:
        raise ValueError(f"{len(errors)} errors, expected {num}")
    return StepDone(number, tokens, errors, lacks_memory, seconds)
