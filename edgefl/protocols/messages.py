"""The small facts of the control plane as JSON, below 32 KB each.

Every message is a frozen dataclass; `encode` and `decode` are its bytes. Unknown keys are ignored, so
that a newer cloud can speak to an older agent; a missing or ill-typed key raises ProtocolError.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import dacite

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, ProtocolError

MAX_MESSAGE_BYTES = 32 << 10

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobRef:
    """Content-addressed bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Signed:
    """Canonical JSON text and its Ed25519 signature; made and checked by `edgefl.models.manifest`."""

    text: str
    key_id: str
    signature: str  # base64


@dataclass(frozen=True, kw_only=True, slots=True)
class WirePlan:
    """A round's plan as a device gets it (down/<device>/job and `Next`)."""

    job: str
    round: int
    model: BlobRef  # safetensors: the parameters to start from; of a message: what Flower's client app is sent
    model_blake3: str  # their BLAKE3: every device checks them every round, in a quarter of SHA-256's time
    bundle: Signed  # a signed manifest.Bundle: the task's code
    train: TrainConfig
    deadline_s: float
    max_update_bytes: int
    envelope: str = ""  # of a message of a relayed Flower app: its metadata; empty = a round of training
    kind: str = "plan"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundClosed:
    """The round is over: stop training for it, drop its update (down/<device>/job)."""

    job: str
    round: int
    job_ended: bool  # no further round will come: the trainer can rest
    kind: str = "closed"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRefused:
    """A guard refused this device's update (down/<device>/job)."""

    job: str
    round: int
    reason: str
    kind: str = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceState:
    """Presence (up/<device>/state, retained; the will is the same with online = false).

    A will may overtake a rebirth: of two messages the one with the higher session counts.
    """

    session: int  # milliseconds since 1970 at the agent's connect: only ever compared, never a time
    online: bool
    agent_version: str
    models: Mapping[str, int] = field(default_factory=dict)  # model -> version that it serves
    tags: Mapping[str, str] = field(default_factory=dict)
    serving_url: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutNote:
    """How far a device is with a release (up/<device>/rollout)."""

    model: str
    version: int
    state: str  # downloading | installed | active | failed
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """What a device has (up/<device>/telemetry, QoS 0)."""

    cpu_count: int
    cpu_percent: float
    load_1m: float
    ram_total_mb: float
    ram_available_mb: float
    disk_free_mb: float
    battery_percent: float | None = None
    on_mains: bool | None = None


JOB_MESSAGES: Mapping[str, type[Any]] = {"plan": WirePlan, "closed": RoundClosed, "refused": UpdateRefused}


def encode(message: Any) -> bytes:
    """Return a message's JSON; raises ProtocolError above MAX_MESSAGE_BYTES."""
    data = json.dumps(dataclasses.asdict(message), separators=(",", ":"), allow_nan=False).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{type(message).__name__} has {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    return data


def decode(schema: type[_T], data: bytes) -> _T:
    """Return a message from its JSON; raises ProtocolError."""
    return from_json(schema, _parse(data))


def decode_job(data: bytes) -> WirePlan | RoundClosed | UpdateRefused:
    """Return whichever message of down/<device>/job this is; raises ProtocolError."""
    value = _parse(data)
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in JOB_MESSAGES:
        raise ProtocolError(f"job message of kind {kind!r:.100} is not one of: {', '.join(JOB_MESSAGES)}")
    message: WirePlan | RoundClosed | UpdateRefused = from_json(JOB_MESSAGES[kind], value)
    return message


def from_json(schema: type[_T], value: Mapping[str, Any]) -> _T:
    """Build a message from parsed JSON; raises ProtocolError."""
    hooks = {float: lambda number: float(number) if type(number) is int else number}
    try:
        return dacite.from_dict(schema, dict(value), dacite.Config(type_hooks=hooks))
    except (dacite.DaciteError, ConfigError) as cause:
        raise ProtocolError(f"{schema.__name__}: {cause}") from cause


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as cause:
        raise ProtocolError(f"message is not JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise ProtocolError(f"message is a JSON {type(value).__name__}, not an object")
    return value
