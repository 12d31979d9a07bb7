"""What the server and its training process say to each other, over a pair of sockets: records of many sessions.

uint32 session, uint8 kind, uint32 length, content (little-endian)

server: OPEN (JSON of `SessionSpec`), FRAME (a device's), GONE (the device's stream ended),
            FORGET (a round: all before it are over)
child:  READY, FRAME (for the device), TAKEN (a frame is handled), END (JSON: status, reason)
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

from edgefl.config import TrainConfig, from_dict
from edgefl.errors import ProtocolError

OPEN, FRAME, GONE, TAKEN, END, READY, FORGET = range(7)
HEAD = struct.Struct("<IBI")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionSpec:
    """Whose training it is, and from what it begins."""

    device: str
    round: int
    tensors: str  # path of the model's tensors that are not the devices': the cloud's part at the round's beginning
    train: TrainConfig = field(default_factory=TrainConfig)  # of the round
    inputs: str = ""  # the layout of the model's inputs
    samples: int = 1
    steps: int = 1
    rank: int = 0  # of the device's adapters; 0 = the task's own

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, content: bytes) -> SessionSpec:
        """Return the spec; raises ProtocolError."""
        try:
            said: dict[str, Any] = json.loads(content)
            return cls(**{**said, "train": from_dict(TrainConfig, said["train"])})
        except (ValueError, KeyError, TypeError) as cause:
            raise ProtocolError(f"invalid session from the server: {content[:80]!r}") from cause


def record(session: int, kind: int, content: bytes | memoryview = b"") -> bytes:
    """Return a record's bytes."""
    return HEAD.pack(session, kind, len(content)) + content
