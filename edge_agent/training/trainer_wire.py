"""What the agent and its trainer child say to each other, over a socket: length-prefixed JSON.

    child:  hello {pid}
    parent: fit {job, round, client, train, model, frozen, bundle, task, options, out, memory_limit_mb,
            folder} | errand {app, order, envelope, bundle, options, state, state_out, out, memory_limit_mb, folder}
    child:  done {size, blake3, weight, metrics, changed} | failed {reason, spent}

A fit is a round of training, an errand hands a message to a Flower app's ClientApp; one at a time. `spent` says
that the child is no longer fit for use (it ran out of memory) and ends.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError
from edgefl.protocols.fields import Checked, from_json, limited, parse_json, prose, raw, to_json
from edgefl.protocols.messages import MAX_ROUND

MAX_FRAME_BYTES = 1 << 20
_HEAD = struct.Struct(">I")
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello(Checked):
    """The child is there."""

    pid: int
    kind: str = "hello"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit(Checked):
    """Train for one plan."""

    job: str
    round: int = field(metadata=limited(least=0, most=MAX_ROUND))
    client: str
    train: TrainConfig
    model: str = field(metadata=raw())  # path of the parameters, a safetensors file
    bundle: str = field(metadata=raw())  # path of the verified bundle, unpacked beside it
    task: str  # module:attribute in it
    options: Mapping[str, str] = field(metadata=raw())
    out: str = field(metadata=raw())  # path to write the update to; old bytes there are overwritten
    memory_limit_mb: int  # of the child's data; 0 = none
    folder: str = ""  # where the task works, an existing folder of its own; empty = where the child is
    frozen: str = ""  # path of the model's other tensors, which are not trained; empty = there are none
    parted: bool = False  # whether `model` is just what is trained, and the buffers
    kind: str = "fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Errand(Checked):
    """Hand a message to the ClientApp of a bundle."""

    app: str  # module:attribute of its ClientApp
    order: str = field(metadata=raw())  # path of what the message holds
    envelope: str  # its metadata
    bundle: str = field(metadata=raw())  # path of the verified bundle, unpacked beside it
    options: Mapping[str, str] = field(metadata=raw())
    state: str = field(metadata=raw())  # path of the node's state; empty = none yet
    state_out: str = field(metadata=raw())  # path to write its next state to
    out: str = field(metadata=raw())  # path to write the reply to; old bytes there are overwritten
    memory_limit_mb: int  # of the child's data; 0 = none
    folder: str = ""  # where the app works, an existing folder of its own; empty = where the child is
    kind: str = "errand"


@dataclass(frozen=True, kw_only=True, slots=True)
class Done(Checked):
    """The answer is at `out`, whole and synced; so is the state after an errand, where it `changed`."""

    size: int = field(metadata=limited(least=0))
    blake3: str = field(metadata=limited(max_chars=64))
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    changed: bool = False
    kind: str = "done"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed(Checked):
    """There will be no update, and why."""

    reason: str = field(metadata=prose())
    spent: bool = False
    kind: str = "failed"


_KINDS: Mapping[str, type[Any]] = {"hello": Hello, "fit": Fit, "errand": Errand, "done": Done, "failed": Failed}

Message = Hello | Fit | Errand | Done | Failed


def frame(message: Message) -> bytes:
    """Return a message's bytes, head included."""
    body = json.dumps(to_json(message)).encode()
    return _HEAD.pack(len(body)) + body


def body_bytes(head: bytes) -> int:
    """Return how many bytes follow a head; raises ProtocolError."""
    length = int(_HEAD.unpack(head)[0])
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a frame of {length} bytes between agent and trainer; at most {MAX_FRAME_BYTES} are allowed"
        )
    return length


def parse(body: bytes) -> Message:
    """Return the message of a body; raises ProtocolError."""
    try:
        value = parse_json(body)
        schema = _KINDS[value["kind"]]
    except (ProtocolError, KeyError, TypeError) as cause:
        raise ProtocolError(f"not a message between agent and trainer: {body[:80]!r}") from cause
    message: Message = from_json(schema, value)
    return message
