"""The protocol between the stage server and a tail's process: messages over a socket pair, each a header and bytes.

uint32 length of the header, uint32 length of the bytes (little-endian), the header in JSON, the bytes

process: TailUp      the stage is loaded
TailNotLoaded  it cannot be loaded
server:  RunStep     compute rows of several sequences; their hidden states are the bytes, one after the other
process: StepDone    the token of each, or why there is none
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgefl.errors import ProtocolError

HEAD = struct.Struct("<II")
MAX_HEADER_BYTES, MAX_BODY_BYTES = 4 << 20, 256 << 20
MAX_ERROR_CHARS = 2000


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepItem:
    """Some next rows of one sequence."""

    key: int
    num: int  # rows
    datatype: str
    position: int  # tokens before them; 0 begins the sequence again
    room: int  # tokens that the sequence will have at most
    wants_token: bool
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStep:
    """Compute a step, after the caches of the sequences in `drop` are freed."""

    step: int
    items: list[Any]  # of StepItem
    drop: list[int]
    kind: str = "run"

    def parsed(self) -> list[StepItem]:
        return [StepItem(**one) for one in self.items]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """The results of a step, in the order of its items: a token or None, and what went wrong or nothing."""

    step: int
    tokens: list[int | None]
    errors: list[str]
    lacks_memory: bool = False
    seconds: float = 0.0
    kind: str = "done"


Message = TailUp | TailNotLoaded | RunStep | StepDone
_KINDS: Mapping[str, type[Any]] = {"up": TailUp, "failed": TailNotLoaded, "run": RunStep, "done": StepDone}


def packed(message: Message, body: bytes = b"") -> bytes:
    """Encode a message."""
    header = json.dumps(dataclasses.asdict(message), separators=(",", ":")).encode()
    return HEAD.pack(len(header), len(body)) + header + body


def sizes_of(head: bytes) -> tuple[int, int]:
    """Return the lengths of header and bytes; raises ProtocolError."""
    header, body = HEAD.unpack(head)
    if header > MAX_HEADER_BYTES or body > MAX_BODY_BYTES:
        raise ProtocolError(f"a message between server and tail has a header of {header} and {body} bytes")
    return header, body


def parse_header(data: bytes) -> Message:
    """Decode a header; raises ProtocolError."""
    try:
        value = json.loads(data)
        message: Message = _KINDS[value["kind"]](**value)
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise ProtocolError(f"not a message between server and tail: {data[:80]!r}") from cause
    return message
