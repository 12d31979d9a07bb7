"""The control plane's messages as JSON, below 32 KB each.

Every message is a frozen dataclass that checks its fields when it is created (`edgefl.protocols.fields`); `encode`
and `decode` convert it to and from bytes. Unknown keys are ignored, so that a newer cloud can talk to an older
agent; a missing key or a wrong value raises ProtocolError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from edgefl.config import MAX_WORKERS, TrainConfig
from edgefl.errors import ProtocolError
from edgefl.process.log_tail import MAX_RECORDS
from edgefl.protocols.fields import Checked, from_json, limited, parse_json, prose, raw, to_json

__all__ = [
    "ASSIGNMENTS", "COMMANDS", "MAX_MESSAGE_BYTES", "Assignment", "BlobRef", "Command", "Deliver", "DeviceState",
    "Division", "Evaluate", "Fit", "JobMessage", "LogWanted", "ModelReport", "NewParents", "RolloutNote", "RoundClosed",
    "Signed",
    "Telemetry", "UpdateRefused", "decode", "decode_command", "decode_job", "encode", "from_json",
]  # fmt: skip

MAX_MESSAGE_BYTES = 32 << 10
MAX_ROUND = 2**32 - 1  # as fleet.proto carries it
MAX_SECONDS = 1e9
MAX_NAME_CHARS = 200
MAX_TAGS, MAX_TAG_CHARS = 32, 64
MAX_TENSORS = 100_000  # of a model

_T = TypeVar("_T")
_WRITER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobRef(Checked):
    """Content-addressed bytes."""

    sha256: str = field(metadata=limited(max_chars=64))
    size: int = field(metadata=limited(least=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Division(Checked):
    """What a job in parts trains in the cloud, and what its devices have beside the tensors that they send."""

    in_cloud: Mapping[str, str] = field(metadata=limited(max_items=MAX_TENSORS))  # each trained or counted name -> one
    buffers: Sequence[str] = field(metadata=limited(max_items=MAX_TENSORS))  # of them, those that are only counted
    device_frozen: BlobRef | None = None  # safetensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed(Checked):
    """Canonical JSON text and its Ed25519 signature; made and checked by `edgefl.protocols.manifest`."""

    text: str = field(metadata=raw())  # checked with its signature
    key_id: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    signature: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # base64


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit(Checked):
    """A device is asked to train: its part in one round of a job (down/<device>/job and `Next`)."""

    replaces_older: ClassVar[bool] = True  # of its job: a device works for the newest round alone

    job: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    round: int = field(metadata=limited(least=0, most=MAX_ROUND))
    model: BlobRef  # safetensors: the parameters to start from
    # Their BLAKE3 hash: every device checks it every round, in a quarter of SHA-256's time.
    model_blake3: str = field(metadata=limited(max_chars=64))
    bundle: Signed  # a signed manifest.Bundle: the task's code
    train: TrainConfig
    deadline_s: float = field(metadata=limited(least=0, most=MAX_SECONDS))
    max_update_bytes: int = field(metadata=limited(least=0))
    frozen: BlobRef | None = None  # safetensors: the model's frozen tensors, the same in every round of the job
    parted: bool = False  # whether `model` holds only the trained tensors and the buffers
    evaluate: bool = False  # also evaluate `model` on the device's held-out samples
    takes_late: bool = False  # the next round takes the update, too: do not stop when that one begins
    fragment: BlobRef | None = None  # safetensors: of `model`, what the round before has changed; None = not known
    fragment_blake3: str = field(default="", metadata=limited(max_chars=64))
    kind: str = "fit"

    @property
    def keeps_state(self) -> bool:
        """Whether the client keeps something for its next round."""
        return self.train.keeps_state or self.train.split.keeps_state

    def blobs(self) -> tuple[BlobRef, ...]:
        """Return what a device may fetch for it, beside the bundle."""
        return tuple(one for one in (self.model, self.frozen, self.fragment) if one is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate(Checked):
    """A device is asked to evaluate a job's last parameters, without training (down/<device>/job and `Next`)."""

    replaces_older: ClassVar[bool] = True

    job: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    round: int = field(metadata=limited(least=0, most=MAX_ROUND))  # the one after the last
    model: BlobRef  # as in `Fit`, like the fields below
    model_blake3: str = field(metadata=limited(max_chars=64))
    bundle: Signed
    seed: int = field(metadata=limited(least=0))  # of the job, for the task's loader
    deadline_s: float = field(metadata=limited(least=0, most=MAX_SECONDS))
    max_update_bytes: int = field(metadata=limited(least=0))  # of the answer, which has no tensors
    frozen: BlobRef | None = None
    parted: bool = False
    workers: int = field(default=0, metadata=limited(least=0, most=MAX_WORKERS))  # of the job's `train`
    kind: str = "evaluate"

    def blobs(self) -> tuple[BlobRef, ...]:
        """Return what a device fetches for it, beside the bundle."""
        return (self.model,) if self.frozen is None else (self.model, self.frozen)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deliver(Checked):
    """A device is asked to hand one message to a Flower app's ClientApp (down/<device>/job and `Next`)."""

    replaces_older: ClassVar[bool] = False  # each message is answered

    job: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # the relay
    round: int = field(metadata=limited(least=0, most=MAX_ROUND))  # the message's number
    envelope: str  # the message's metadata, for its two ends alone
    content: BlobRef  # what it holds, which other messages may hold too
    content_blake3: str = field(metadata=limited(max_chars=64))
    bundle: Signed  # a signed manifest.Bundle: the app's code
    deadline_s: float = field(metadata=limited(least=0, most=MAX_SECONDS))
    max_update_bytes: int = field(metadata=limited(least=0))  # of the reply
    kind: str = "deliver"

    def blobs(self) -> tuple[BlobRef, ...]:
        """Return what a device fetches for it, beside the bundle."""
        return (self.content,)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundClosed(Checked):
    """The round is over: stop training for it, drop its update (down/<device>/job)."""

    job: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    round: int = field(metadata=limited(least=0, most=MAX_ROUND))
    job_ended: bool  # no further round will come: the trainer can stop
    kind: str = "closed"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRefused(Checked):
    """A guard refused this device's update (down/<device>/job)."""

    job: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    round: int = field(metadata=limited(least=0, most=MAX_ROUND))
    reason: str = field(metadata=prose())
    kind: str = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceState(Checked):
    """Presence (up/<device>/state, retained; the will is the same with online = false).

    The will of an old session may arrive after a new connect: the message with the higher session is valid.
    """

    session: int  # milliseconds since 1970 at the agent's connect: only compared, never used as a time
    online: bool
    agent_version: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    models: Mapping[str, int] = field(default_factory=dict)  # model -> version that the device serves
    tags: Mapping[str, str] = field(default_factory=dict, metadata=limited(max_items=MAX_TAGS, max_chars=MAX_TAG_CHARS))
    serving_url: str = field(default="", metadata=limited(max_chars=MAX_NAME_CHARS))
    # Kinds of commands that the agent follows; older agents follow none.
    commands: Sequence[str] = field(default_factory=list, metadata=limited(max_items=MAX_TAGS, max_chars=MAX_TAG_CHARS))
    # Why the device's own policy keeps it from working now: a reason's code -> what was measured; empty = it works.
    refuses: Mapping[str, str] = field(
        default_factory=dict, metadata=limited(max_items=MAX_TAGS, max_chars=MAX_NAME_CHARS)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogWanted(Checked):
    """A device is asked for the end of its own log, which it uploads by `SendLog` (down/<device>/command)."""

    kind_name: ClassVar[str] = "log"

    request: str = field(metadata=limited(max_chars=MAX_TAG_CHARS))  # its id, which the upload repeats
    lines: int = field(metadata=limited(least=1, most=MAX_RECORDS))
    job: str = field(default="", metadata=limited(max_chars=MAX_NAME_CHARS))  # only lines about this job; empty = all
    kind: str = "log"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewParents(Checked):
    """A device is told where it may connect from now on (down/<device>/command)."""

    kind_name: ClassVar[str] = "parents"

    signed: Signed  # a signed manifest.Parents
    kind: str = "parents"


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutNote(Checked):
    """A device's progress with a release (up/<device>/rollout)."""

    model: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    version: int = field(metadata=limited(least=0))
    state: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # downloading | installed | active | failed
    detail: str = field(default="", metadata=prose())


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport(Checked):
    """How a model is served on a device."""

    version: int = field(metadata=limited(least=0))
    placement: str = field(default="", metadata=prose(MAX_NAME_CHARS * 2))  # empty = whole, on the device
    # By placement: milliseconds of one run on the sample's first inputs, of what runs on the device.
    profile_ms: Mapping[str, float] = field(default_factory=dict, metadata=limited(max_items=MAX_TAGS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry(Checked):
    """A device's resources (up/<device>/telemetry, QoS 0)."""

    cpu_count: int
    cpu_percent: float
    load_1m: float
    ram_total_mb: float
    ram_available_mb: float
    disk_free_mb: float
    battery_percent: float | None = None
    on_mains: bool | None = None
    models: Mapping[str, ModelReport] = field(default_factory=dict, metadata=limited(max_items=MAX_TAGS))


Assignment = Fit | Deliver | Evaluate  # what one device is asked
JobMessage = Assignment | RoundClosed | UpdateRefused  # what comes on down/<device>/job

ASSIGNMENTS: Mapping[str, type[Assignment]] = {
    "fit": Fit,
    "deliver": Deliver,
    "evaluate": Evaluate,
}  # as fleet.proto names them
Command = LogWanted | NewParents  # what comes on down/<device>/command
COMMANDS: Mapping[str, type[Command]] = {LogWanted.kind_name: LogWanted, NewParents.kind_name: NewParents}
JOB_MESSAGES: Mapping[str, type[JobMessage]] = {**ASSIGNMENTS, "closed": RoundClosed, "refused": UpdateRefused}


def encode(message: Any) -> bytes:
    """Return a message's JSON; raises ProtocolError above MAX_MESSAGE_BYTES."""
    data = _WRITER.encode(to_json(message)).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{type(message).__name__} has {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    return data


def decode(schema: type[_T], data: bytes) -> _T:
    """Return a message from its JSON; raises ProtocolError."""
    return from_json(schema, _parse(data))


def decode_job(data: bytes) -> JobMessage:
    """Return a message of down/<device>/job, by its kind; raises ProtocolError."""
    value = _parse(data)
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in JOB_MESSAGES:
        raise ProtocolError(f"job message of kind {kind!r:.100} is not one of: {', '.join(JOB_MESSAGES)}")
    return from_json(JOB_MESSAGES[kind], value)


def decode_command(data: bytes) -> Command:
    """Return a message of down/<device>/command, by its kind; raises ProtocolError."""
    value = _parse(data)
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in COMMANDS:
        raise ProtocolError(f"command of kind {kind!r:.100} is not one of: {', '.join(COMMANDS)}; update the agent")
    return from_json(COMMANDS[kind], value)


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ProtocolError(f"message is a JSON {type(value).__name__}, not an object")
    return value
