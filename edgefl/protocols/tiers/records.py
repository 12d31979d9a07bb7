"""What a region and its parent tell each other, as entries of two mirrors (`edgefl.protocols.tiers.mirror`).

From the parent: `member/<name>` who is enrolled below the region, `revoked` the list of revoked certificates,
`running` the jobs that have not ended, `work/<job>/<round>` what the region's devices are asked,
`deliver/<relay>/<number>` a message of a Flower app for one of them, `command/<device>` a command for one,
`desired/<device>/<model>` which releases they should serve, `parents/<device>` where they may connect,
`certificate-days` how long new certificates are valid.
From the region: `region/<name>` what it and the regions below it are, `state/<device>`, `telemetry/<device>` and
`note/<device>/<model>`, as its devices said by MQTT, `log/<device>` the end of a device's log that was asked for,
`serial/<device>` the renewed certificate that a device uses.

A device's reply to a message is uploaded with a `MessageReply` in its header, and the number 0 instead of a sum's.
A region's partial sum is uploaded like an update, with a `SumNote` in its header: the weighted mean of its devices'
updates as safetensors, in the dtypes of `edgefl.guards.partial_spec`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgefl.errors import ProtocolError
from edgefl.protocols.fields import Checked, from_json, limited, prose, raw, to_json
from edgefl.protocols.manifest import MAX_PARENTS
from edgefl.protocols.messages import MAX_NAME_CHARS, MAX_TAG_CHARS, MAX_TAGS, Deliver, Evaluate, Fit

MAX_DEVICES = 10_000  # in one round of one region: their names and metrics are in one message of a megabyte
MAX_METRICS = 1000
MAX_REGIONS = 1000  # that have made a sum
RECEIVES = "edgefl-receives"  # metadata of the reply to a sum's header: its bytes are wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class Member(Checked):
    """A device or a region below a region, as the fleet's cloud enrolled it."""

    serials: Sequence[str]  # of its valid certificates
    is_region: bool = False
    parents: Sequence[str] = field(default_factory=list, metadata=limited(max_items=MAX_PARENTS))  # in its order
    tags: Mapping[str, str] = field(default_factory=dict, metadata=limited(max_items=MAX_TAGS, max_chars=MAX_TAG_CHARS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Work(Checked):
    """What a region is asked: to send the assignment to these devices, and to return the sum of their updates.

    The assignment's deadline is the time that is left for the region's answer.
    """

    fit: Fit | None = None  # one of these two
    evaluate: Evaluate | None = None
    devices: Sequence[str] = field(default_factory=list, metadata=limited(max_items=MAX_DEVICES))
    offline_grace_s: float = field(default=0.0, metadata=limited(least=0))
    region_rounds: int = field(default=1, metadata=limited(least=1, most=1000))  # rounds here before the sum is sent

    @property
    def assignment(self) -> Fit | Evaluate:
        """What each device is asked; raises ProtocolError if there is nothing, or two things."""
        asked = [one for one in (self.fit, self.evaluate) if one is not None]
        if len(asked) != 1:
            raise ProtocolError(f"the work of a region has {len(asked)} assignments, expected one")
        return asked[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message(Checked):
    """A message of a Flower app for a device below a region. Its deadline is the time that is left."""

    device: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    deliver: Deliver


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageReply(Checked):
    """Whose reply to a message a region uploads; with a reason there is none, and no content."""

    device: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    reason: str = field(default="", metadata=prose())


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionState(Checked):
    """A region, as it says itself."""

    version: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    parent: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    host: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # where devices reach it
    grpc_port: int = field(metadata=limited(least=1, most=65535))
    http_port: int = field(metadata=limited(least=1, most=65535))
    mqtt_port: int = field(metadata=limited(least=1, most=65535))
    devices_up_bytes: int = field(default=0, metadata=limited(least=0))  # models and updates, since its start
    devices_down_bytes: int = field(default=0, metadata=limited(least=0))
    parent_up_bytes: int = field(default=0, metadata=limited(least=0))
    parent_down_bytes: int = field(default=0, metadata=limited(least=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSent(Checked):
    """The end of a device's own log, as it answered a command."""

    request: str = field(metadata=limited(max_chars=MAX_TAG_CHARS))  # the id in the command
    text: str = field(metadata=raw())
    cut: bool = False  # whether earlier lines were left out


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionPart(Checked):
    """A region's part in a sum, as `edgefl.records.RegionRound`."""

    parent: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    admitted: Sequence[str] = field(default_factory=list, metadata=limited(max_items=MAX_DEVICES))
    failures: Mapping[str, str] = field(default_factory=dict, metadata=limited(max_items=MAX_DEVICES))
    seconds: float = field(default=0.0, metadata=limited(least=0))
    up_bytes: int = field(default=0, metadata=limited(least=0))
    down_bytes: int = field(default=0, metadata=limited(least=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class SumNote(Checked):
    """What a region's partial sum is of. Devices that failed have no part in the sum, but an answer."""

    weights: Mapping[str, float] = field(metadata=limited(max_items=MAX_DEVICES))  # contributor -> weight
    failed: Mapping[str, str] = field(default_factory=dict, metadata=limited(max_items=MAX_DEVICES))  # -> why
    rejected: Mapping[str, str] = field(default_factory=dict, metadata=limited(max_items=MAX_DEVICES))
    metrics: Mapping[str, Sequence[float]] = field(
        default_factory=dict, metadata=limited(max_items=MAX_METRICS)
    )  # -> sum of weight * value, sum of weights
    # Federated evaluation: of each device, its metrics, its weight, and why it has none.
    evaluations: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict, metadata=limited(max_items=MAX_DEVICES)
    )
    evaluation_weights: Mapping[str, float] = field(default_factory=dict, metadata=limited(max_items=MAX_DEVICES))
    evaluation_faults: Mapping[str, str] = field(default_factory=dict, metadata=limited(max_items=MAX_DEVICES))
    losses: Mapping[str, float] = field(default_factory=dict, metadata=limited(max_items=MAX_DEVICES))  # `train_loss`
    regions: Mapping[str, RegionPart] = field(default_factory=dict, metadata=limited(max_items=MAX_REGIONS))
    note: str = field(default="", metadata=prose())

    @property
    def devices(self) -> set[str]:
        """All devices whose answers it has."""
        return {*self.weights, *self.failed, *self.rejected}


def pack(message: Any) -> bytes:
    """Return a message's JSON, which may be larger than one by MQTT."""
    return json.dumps(to_json(message), separators=(",", ":"), allow_nan=False).encode()


def unpack(schema: type[Any], data: bytes) -> Any:
    """Return a message from its JSON; raises ProtocolError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as cause:
        raise ProtocolError(f"{schema.__name__} is not JSON: {cause}") from cause
    return from_json(schema, value)
