"""What can be known of a device, by name: the fields of a select expression.

A value is None as long as it is not known. `samples`, `loss`, `duration_s` come from a device's updates: before its
first one, they exclude nobody. The others come from enrolment and telemetry: a device without them is not chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Value = float | str | bool
Facts = Callable[[str], Value | None]  # field -> its value for one device; None = not known

TAG = "tag."  # begins the fields of tags; a device without the tag has an empty text

REPORTED: Mapping[str, type[Value]] = {  # by a device's telemetry
    "mem_mb": float,  # free memory
    "mem_total_mb": float,
    "disk_mb": float,  # free disk, where the agent has its home
    "cpu_count": float,
    "cpu_percent": float,  # in use
    "load": float,  # mean over a minute
    "battery_percent": float,  # not known without a battery
    "on_mains": bool,  # not known without a battery
}
LEARNT: Mapping[str, type[Value]] = {  # from a device's part in the job's rounds
    "samples": float,  # of its last update
    "loss": float,  # `train_loss` of its last update
    "duration_s": float,  # until its last update arrived, since the round's start
    "staleness": float,  # rounds since its last update; without one, since the job's start
    "failures": float,  # rounds in a row without an admitted update
    "rounds": float,  # with an admitted update
}
FIELDS: Mapping[str, type[Value]] = {"name": str, **REPORTED, **LEARNT}


def type_of(name: str) -> type[Value] | None:
    """Return the type of a field's values; None for an unknown field."""
    return str if name.startswith(TAG) else FIELDS.get(name)


def known_text() -> str:
    """Return all fields for a message."""
    return ", ".join(["name", "tag.NAME", *REPORTED, *LEARNT])


def shown(value: Value | None) -> str:
    """Return a value for a message."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, str) else f"{value:g}"
