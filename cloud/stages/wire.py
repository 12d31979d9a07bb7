"""The protocol between the stage server and a stage's process: one JSON message per packet of a socket pair.

    process: StageUp      the model is loaded; what it takes and returns
             StageFailed  it cannot be loaded
    server:  RunBatch     compute the outputs of a batch in shared memory
    process: BatchDone | BatchFailed

Tensors do not pass here: messages say where they are in the shared memory (`cloud.stages.slots`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cloud.stages.slots import Placed
from edgefl.errors import ProtocolError

MAX_PACKET_BYTES = 128 << 10
MAX_ERROR_CHARS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class StageUp:
    """The model is loaded. Inputs and outputs: (name, datatype, shape with -1 for any size)."""

    inputs: list[Any]
    outputs: list[Any]
    unmerged: str  # why rows of several requests cannot be one batch; empty if they can
    kind: str = "up"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFailed:
    """The model cannot be loaded."""

    error: str
    kind: str = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunBatch:
    """Compute all outputs; write them from `free` on, at most up to `end`."""

    batch: int
    tensors: Mapping[str, Any]  # by name: datatype, shape, offset
    free: int
    end: int
    kind: str = "run"

    def placed(self) -> dict[str, Placed]:
        """Return the tensors."""
        return placed_of(self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchDone:
    """The outputs of a batch."""

    batch: int
    tensors: Mapping[str, Any]
    free: int  # behind the outputs
    kind: str = "done"

    def placed(self) -> dict[str, Placed]:
        """Return the tensors."""
        return placed_of(self.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchFailed:
    """A batch that the model could not compute."""

    batch: int
    error: str
    memory: bool  # whether memory was what it lacked
    kind: str = "error"


Message = StageUp | StageFailed | RunBatch | BatchDone | BatchFailed
_KINDS: Mapping[str, type[Any]] = {
    "up": StageUp,
    "failed": StageFailed,
    "run": RunBatch,
    "done": BatchDone,
    "error": BatchFailed,
}


def packet(message: Message) -> bytes:
    """Encode a message."""
    return json.dumps(asdict(message), separators=(",", ":")).encode()


def parse_packet(data: bytes) -> Message:
    """Decode a message; raises ProtocolError."""
    try:
        value = json.loads(data)
        message: Message = _KINDS[value["kind"]](**value)
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise ProtocolError(f"not a message between server and stage: {data[:80]!r}") from cause
    return message


def placed_of(tensors: Mapping[str, Any]) -> dict[str, Placed]:
    """Return tensors as a message describes them."""
    return {name: Placed(one[0], tuple(one[1]), one[2]) for name, one in tensors.items()}


def described_places(tensors: Mapping[str, Placed]) -> dict[str, Any]:
    """Return tensors for a message."""
    return {name: (one.datatype, one.shape, one.offset) for name, one in tensors.items()}
