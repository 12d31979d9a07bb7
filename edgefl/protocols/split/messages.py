"""The messages of training in parts, over one stream of bytes each way.

    device: begin                                   cloud: begun (the step to begin with)
            forward {step, number} + values                outputs + values, if the device has a last part
            gradients {step, number} + gradients           returned {loss} + gradients of what crossed
            keep {step}                                     kept {step}
            finish                                          finished
    with a frozen device part, whose activations are sent once:
            wanted + keys                                   lacks + positions
            rows + positions, values, targets               stored
            sample_step {step} + positions                  stepped {loss}
    at any time                                             refused {status, reason}, then the end

A frame is uint32 length, uint32 length of the header, the header in JSON, and its sections: messages of
`edgefl.offload.wire`, with the tensors of one kind each. All numbers are little-endian. Micro-batches of a step may be
in flight together, up to the window that `begun` states; their answers come in the order in which they were sent.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgefl.config import MAX_RANK
from edgefl.errors import ProtocolError
from edgefl.protocols.fields import Checked, from_json, limited, parse_json, prose, to_json
from edgefl.protocols.messages import MAX_NAME_CHARS, MAX_ROUND, MAX_SECONDS

VERSION = 1
SERVICE, METHOD = "edgefl.v1.SplitTraining", "Train"
MAX_FRAME_BYTES = 256 << 20
MAX_STEPS = 2**31 - 1
KEY_BYTES = 16  # of a sample
MAX_SECTIONS = 4
MAX_LAYOUT_CHARS = 8000
_LENGTH = struct.Struct("<I")
_STEP = limited(least=0, most=MAX_STEPS)
_NUMBER = limited(least=0, most=MAX_STEPS)


@dataclass(frozen=True, kw_only=True, slots=True)
class BeginTraining(Checked):
    """A device begins its training in a round, or continues it after a lost connection."""

    version: int
    job: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    round: int = field(metadata=limited(least=1, most=MAX_ROUND))
    bundle: str = field(metadata=limited(max_chars=64))  # SHA-256 of the task's code
    samples: int = field(metadata=limited(least=1, most=MAX_STEPS))  # of the device: its weight
    steps: int = field(metadata=limited(least=1, most=MAX_STEPS))  # that it will take
    inputs: str = field(metadata=limited(max_chars=MAX_LAYOUT_CHARS))  # the layout of its first micro-batch
    kept: Sequence[int] = ()  # steps before which it has its state
    rank: int = field(default=0, metadata=limited(least=0, most=MAX_RANK))  # of the device's adapters; 0 = the task's
    remaining_s: float = field(default=MAX_SECONDS, metadata=limited(least=0, most=MAX_SECONDS))  # until its deadline
    kind: str = "begin"


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun(Checked):
    """Both sides have the state before this step."""

    step: int = field(metadata=_STEP)
    window: int = field(metadata=limited(least=1, most=1024))  # micro-batches that may be in flight
    kind: str = "begun"


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward(Checked):
    """What crossed the cut; sections: values, then targets unless they stay on the device."""

    step: int = field(metadata=_STEP)
    number: int = field(metadata=_NUMBER)
    of: int = field(metadata=limited(least=1, most=MAX_STEPS))  # micro-batches in the step
    share: float = field(metadata=limited(least=0, most=1))  # its samples by the batch's
    inputs: str = field(metadata=limited(max_chars=MAX_LAYOUT_CHARS))  # the layout of the model's inputs
    targets: str = field(default="", metadata=limited(max_chars=MAX_LAYOUT_CHARS))  # the layout of the targets
    differentiable: Sequence[str] = ()  # values whose gradients the device wants
    kind: str = "forward"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs(Checked):
    """What the device's last part reads; section: values."""

    step: int = field(metadata=_STEP)
    number: int = field(metadata=_NUMBER)
    kind: str = "outputs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradients(Checked):
    """The gradients of `outputs`; section: gradients."""

    step: int = field(metadata=_STEP)
    number: int = field(metadata=_NUMBER)
    scale: float = 1.0  # the gradients are sent times this
    kind: str = "gradients"


@dataclass(frozen=True, kw_only=True, slots=True)
class Returned(Checked):
    """A micro-batch is done; section: gradients of what crossed, if the device wants any."""

    step: int = field(metadata=_STEP)
    number: int = field(metadata=_NUMBER)
    loss: float  # of the micro-batch; 0 if the device computes it
    scale: float = 1.0
    kind: str = "returned"


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep(Checked):
    """Keep the state before this step."""

    step: int = field(metadata=_STEP)
    kind: str = "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept(Checked):
    """The state before this step is kept."""

    step: int = field(metadata=_STEP)
    kind: str = "kept"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishTraining(Checked):
    """The device has taken all its steps."""

    kind: str = "finish"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFinished(Checked):
    """The cloud's part of this device is durable, and counts if the device's update does."""

    kind: str = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted(Checked):
    """The samples that the training uses; section: keys, uint8 (N, KEY_BYTES)."""

    kind: str = "wanted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lacks(Checked):
    """The samples whose activations are not in the cache; section: positions, int32 (M)."""

    kind: str = "lacks"


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationRows(Checked):
    """Activations for the cache; sections: positions, values, targets."""

    inputs: str = field(metadata=limited(max_chars=MAX_LAYOUT_CHARS))
    targets: str = field(metadata=limited(max_chars=MAX_LAYOUT_CHARS))
    kind: str = "rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored(Checked):
    """Rows are in the cache."""

    held_bytes: int = field(metadata=limited(least=0))  # of this device
    kind: str = "stored"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleStep(Checked):
    """Take a step on samples in the cache; section: positions, int32 (B)."""

    step: int = field(metadata=_STEP)
    kind: str = "sample_step"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped(Checked):
    """The step on cached samples is taken."""

    step: int = field(metadata=_STEP)
    loss: float
    kind: str = "stepped"


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamRefused(Checked):
    """The stream ends: the name of a gRPC status code, and the reason."""

    status: str = field(metadata=limited(max_chars=64))
    reason: str = field(metadata=prose())
    kind: str = "refused"


_KINDS: Mapping[str, type[Any]] = {
    str(one.__dataclass_fields__["kind"].default): one
    for one in (
        BeginTraining, Begun, Forward, Outputs, Gradients, Returned, Keep, Kept, FinishTraining, TrainingFinished,
        Wanted, Lacks, ActivationRows, Stored, SampleStep, Stepped, StreamRefused,
    )
}  # fmt: skip

Message = (
    BeginTraining | Begun | Forward | Outputs | Gradients | Returned | Keep | Kept | FinishTraining | TrainingFinished
    | Wanted | Lacks | ActivationRows | Stored | SampleStep | Stepped | StreamRefused
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Frame:
    """A message and its sections."""

    message: Message
    sections: Sequence[bytes | memoryview] = ()


def pack(message: Message, *sections: bytes | memoryview) -> bytes:
    """Return a frame's bytes, with the length before them."""
    header = json.dumps({**to_json(message), "sections": [len(one) for one in sections]}).encode()
    length = _LENGTH.size + len(header) + sum(len(one) for one in sections)
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a message {message.kind!r} of {length} bytes; at most {MAX_FRAME_BYTES} are allowed. Set a smaller "
            "train.batch_size, or more train.split.micro_batches"
        )
    return b"".join((_LENGTH.pack(length), _LENGTH.pack(len(header)), header, *sections))


def parse_frame(body: bytes | memoryview) -> Frame:
    """Return the frame in these bytes, without the length before them; raises ProtocolError."""
    view = memoryview(body)
    if len(view) < _LENGTH.size or (end := _LENGTH.size + _LENGTH.unpack(view[: _LENGTH.size])[0]) > len(view):
        raise ProtocolError("a message of split training ends within its header")
    value = parse_json(bytes(view[_LENGTH.size : end]))
    schema = _KINDS.get(value.get("kind", "")) if isinstance(value, dict) else None
    if schema is None:
        raise ProtocolError(f"a message of split training is of no known kind: {bytes(view[4:84])!r}")
    lengths = value.get("sections")
    if (
        not isinstance(lengths, list) or len(lengths) > MAX_SECTIONS
        or any(type(one) is not int or one < 0 for one in lengths) or end + sum(lengths) != len(view)
    ):  # fmt: skip
        raise ProtocolError(f"a message {value['kind']!r} has sections {str(lengths)[:80]}, which are not its bytes")
    sections = []
    for length in lengths:
        sections.append(view[end : end + length])
        end += length
    return Frame(from_json(schema, value), sections)


class FrameReader:
    """Takes bytes as they come, and returns the complete frames among them."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes, self._parts = max_bytes, bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Yield the bodies of frames that are complete now; raises ProtocolError for one that is too long."""
        self._parts += data
        while len(self._parts) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._parts)
            if not _LENGTH.size <= length <= self._max_bytes:
                raise ProtocolError(f"a message of {length} bytes; expected {_LENGTH.size} to {self._max_bytes}")
            if len(self._parts) < _LENGTH.size + length:
                return
            body = bytes(memoryview(self._parts)[_LENGTH.size : _LENGTH.size + length])
            del self._parts[: _LENGTH.size + length]
            yield body
