"""The protocol between the agent and its trainer process: length-prefixed JSON over a socket.

    child:  hello {pid}
    parent: fit {job, round, client, train, evaluate, model, frozen, bundle, task, options, out, memory_limit_mb,
            folder, packages, rendezvous, machines, state, state_out, split_socket, split_kept,
            deadline_s} |
            evaluate {client, seed, model, .. as in fit} |
            deliver {app, order, envelope, bundle, options, state, state_out, out, memory_limit_mb, folder}
    child:  done {size, blake3, weight, metrics, changed, evaluation, evaluates} | failed {reason, spent}

`fit` asks for a round of training, `evaluate` for an evaluation without training, `deliver` hands one message to a
Flower app's ClientApp; one request at a time. A `fit` with `evaluate` has two answers: when the update is complete, a
`done` that says `evaluates`; then the last one, with the evaluation.
`spent` means that the child ran out of memory, cannot be used any more, and exits.
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
from edgefl.records import DeviceEvaluation

MAX_FRAME_BYTES = 1 << 20
_HEAD = struct.Struct(">I")
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello(Checked):
    """The child is ready for requests."""

    pid: int
    kind: str = "hello"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRequest(Checked):
    """What training and evaluation need."""

    client: str
    model: str = field(metadata=raw())  # path of the parameters, a safetensors file
    bundle: str = field(metadata=raw())  # path of the verified bundle, unpacked next to it
    task: str  # module:attribute in the bundle
    options: Mapping[str, str] = field(metadata=raw())
    out: str = field(metadata=raw())  # path to write the update to; an existing file is overwritten
    memory_limit_mb: int  # of the child's data; 0 = none
    folder: str = ""  # the task's working folder, which exists; empty = the child's
    frozen: str = ""  # path of the model's frozen tensors; empty = there are none
    parted: bool = False  # whether `model` has only the trained tensors and the buffers
    packages: str = field(default="", metadata=raw())  # a folder of packages beside the agent's own; empty = none


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRequest(TaskRequest):
    """Train for one plan."""

    job: str
    round: int = field(metadata=limited(least=0, most=MAX_ROUND))
    train: TrainConfig
    evaluate: bool = False  # also evaluate the parameters on held-out samples
    rendezvous: str = ""  # HOST:PORT where the other machines of the site join; empty = there are none
    machines: int = 1  # of the site
    state: str = field(default="", metadata=raw())  # path of the client's state; empty = none yet
    state_out: str = field(default="", metadata=raw())  # path to write the client's next state to
    split_socket: str = field(default="", metadata=raw())  # of the agent, to the cloud's part; empty = trained whole
    split_kept: str = field(default="", metadata=raw())  # path of this round's checkpoints of training in parts
    deadline_s: float = 0.0  # of the round, from now; 0 = none
    kind: str = "fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRequest(TaskRequest):
    """Evaluate parameters without training; `out` gets an update without tensors."""

    seed: int  # of the job
    workers: int = 0  # processes that read a Dataset
    kind: str = "evaluate"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliverRequest(Checked):
    """Deliver one message to the ClientApp of a bundle."""

    app: str  # module:attribute of its ClientApp
    order: str = field(metadata=raw())  # path of the message's content
    envelope: str  # the message's metadata
    bundle: str = field(metadata=raw())  # path of the verified bundle, unpacked next to it
    options: Mapping[str, str] = field(metadata=raw())
    state: str = field(metadata=raw())  # path of the client's state; empty = none yet
    state_out: str = field(metadata=raw())  # path to write the client's next state to
    out: str = field(metadata=raw())  # path to write the reply to; an existing file is overwritten
    memory_limit_mb: int  # of the child's data; 0 = none
    folder: str = ""  # the app's working folder, which exists; empty = the child's
    kind: str = "deliver"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkDone(Checked):
    """The result is at `out`, complete and synced; if `changed`, so is the client's next state at `state_out`."""

    size: int = field(metadata=limited(least=0))
    blake3: str = field(metadata=limited(max_chars=64))
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    changed: bool = False
    evaluation: DeviceEvaluation | None = None  # if the request asks for one
    evaluates: bool = False  # the evaluation is not done yet: another answer follows
    kind: str = "done"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkFailed(Checked):
    """The request failed, and why."""

    reason: str = field(metadata=prose())
    spent: bool = False
    kind: str = "failed"


_KINDS: Mapping[str, type[Any]] = {
    "hello": Hello,
    "fit": FitRequest,
    "evaluate": EvaluateRequest,
    "deliver": DeliverRequest,
    "done": WorkDone,
    "failed": WorkFailed,
}

Request = FitRequest | EvaluateRequest | DeliverRequest
Answer = WorkDone | WorkFailed
Message = Hello | Request | Answer


def frame(message: Message) -> bytes:
    """Return a message's bytes with the length before them."""
    body = json.dumps(to_json(message)).encode()
    return _HEAD.pack(len(body)) + body


def body_bytes(head: bytes) -> int:
    """Return how many bytes follow a frame's head; raises ProtocolError if they are too many."""
    length = int(_HEAD.unpack(head)[0])
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a frame of {length} bytes between agent and trainer; at most {MAX_FRAME_BYTES} are allowed"
        )
    return length


def parse(body: bytes) -> Message:
    """Return the message in a frame's body; raises ProtocolError."""
    try:
        value = parse_json(body)
        schema = _KINDS[value["kind"]]
    except (ProtocolError, KeyError, TypeError) as cause:
        raise ProtocolError(f"invalid message between agent and trainer: {body[:80]!r}") from cause
    message: Message = from_json(schema, value)
    return message
