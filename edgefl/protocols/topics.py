"""MQTT topics (MQTT 3.1.1). A device publishes under `up/<device>` and subscribes to `down/<device>`."""

from __future__ import annotations

import re

from edgefl.errors import ProtocolError

ROOT = "edgefl/v1"
EVERY_UP = f"{ROOT}/up/+/+"
UP_KINDS = ("state", "rollout", "telemetry")

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
RESERVED_NAMES = frozenset({"cloud", "broker", "all", "operator"})


def valid_device_name(name: str) -> bool:
    """Whether a name can be a certificate's CN and a topic level: 1 to 64 characters of a-z 0-9 . _ -."""
    return _NAME.fullmatch(name) is not None and name not in RESERVED_NAMES


def up(device: str, kind: str) -> str:
    """Topic that a device publishes on: state (retained), rollout or telemetry."""
    return f"{ROOT}/up/{device}/{kind}"


def down(device: str, kind: str) -> str:
    """Topic that a device reads: job, command or desired (retained)."""
    return f"{ROOT}/down/{device}/{kind}"


def parse_up(topic: str) -> tuple[str, str]:
    """Return (device, kind) of an up topic; raises ProtocolError for any other."""
    parts = topic.split("/")
    if len(parts) != 5 or "/".join(parts[:3]) != f"{ROOT}/up" or parts[4] not in UP_KINDS:
        raise ProtocolError(f"{topic!r} is not {ROOT}/up/<device>/<{'|'.join(UP_KINDS)}>")
    return parts[3], parts[4]


def allowed(name: str, topic: str, *, publish: bool) -> bool:
    """Whether the holder of certificate `name` may publish on, or subscribe to, a topic or filter."""
    if name == "cloud":
        return topic.startswith(f"{ROOT}/")
    if publish:
        return topic in {up(name, kind) for kind in UP_KINDS}
    return topic.startswith(f"{ROOT}/down/{name}/")
