"""What a job's JSON says of it: the curve of each metric, why answers were refused, settings, and how two jobs differ.

A job is read as the cloud returns it (`CloudClient.job`), so that this needs neither the task nor its libraries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgefl.config import JobConfig
from edgefl.operator.client import Json

ON_DEVICES = "devices/"  # begins the names of metrics of federated evaluation
LOSSES = ("loss", "train_loss")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricCurve:
    """The values of one metric over a job's rounds, in order. NaN = not a finite number."""

    name: str
    rounds: tuple[int, ...]
    values: tuple[float, ...]  # not empty

    @property
    def first(self) -> float:
        """The first value."""
        return self.values[0]

    @property
    def last(self) -> float:
        """The last value."""
        return self.values[-1]

    @property
    def lowest(self) -> float:
        """The lowest finite value; NaN if there is none."""
        return min((value for value in self.values if math.isfinite(value)), default=math.nan)

    @property
    def highest(self) -> float:
        """The highest finite value; NaN if there is none."""
        return max((value for value in self.values if math.isfinite(value)), default=math.nan)

    def as_json(self) -> Json:
        """Return the curve and its extremes."""
        return {
            "rounds": list(self.rounds), "values": list(self.values), "first": self.first, "last": self.last,
            "lowest": self.lowest, "highest": self.highest,
        }  # fmt: skip


def curves_of(job: Json) -> list[MetricCurve]:
    """Return the curve of each metric of a job's rounds; evaluated ones first, losses last."""
    found: dict[str, list[tuple[int, float]]] = {}
    for outcome in job.get("rounds", ()):
        for name, value in outcome["metrics"].items():
            found.setdefault(name, []).append((int(outcome["round"]), math.nan if value is None else float(value)))
    return [
        MetricCurve(name=name, rounds=tuple(at for at, _ in found[name]), values=tuple(one for _, one in found[name]))
        for name in _ordered(found)
    ]


def headline(metrics: Mapping[str, float | None]) -> tuple[str, float | None] | None:
    """Return the metric that stands for a round: an evaluated one if there is one, else a loss; None without any."""
    name = next(iter(_ordered(metrics)), None)
    return None if name is None else (name, metrics[name])


def reasons_of(job: Json) -> list[Json]:
    """Return why clients' answers were refused or failed: each reason once, the most frequent first."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in job.get("rounds", ()):
        for device, reason in outcome["reasons"].items():
            one = found.setdefault(reason, {"reason": reason, "count": 0, "devices": [], "last_round": 0})
            one["count"] += 1
            one["last_round"] = int(outcome["round"])
            if device not in one["devices"]:
                one["devices"].append(device)
    return sorted(found.values(), key=lambda one: -one["count"])


def settings_of(job: Json) -> dict[str, Any]:
    """Return a job's settings by their keys, as --set names them; empty for a relay."""
    return dict(_flat(job.get("config") or {}))


def changed_settings(job: Json) -> dict[str, Any]:
    """Return the settings that differ from the defaults of this edgefl."""
    defaults = dict(_flat(dataclasses.asdict(JobConfig())))
    return {key: value for key, value in settings_of(job).items() if key not in defaults or defaults[key] != value}


def compared(jobs: Sequence[Json]) -> Json:
    """Return what differs between jobs, a value per job: facts, settings, metrics (null = a job has none)."""
    facts = {
        "task": [job["name"] for job in jobs],
        "state": [job["state"] for job in jobs],
        "rounds done": [job.get("rounds_done") for job in jobs],
        "seconds": [seconds_of(job) for job in jobs],
    }
    settings = [settings_of(job) for job in jobs]
    keys = dict.fromkeys(key for one in settings for key in one)
    side_by_side = {key: [one.get(key) for one in settings] for key in keys}
    curves = [{curve.name: curve for curve in curves_of(job)} for job in jobs]
    names = _ordered(dict.fromkeys(name for one in curves for name in one))
    return {
        "jobs": [{"id": job["id"], "label": job.get("label")} for job in jobs],
        "facts": facts,
        "settings": {key: values for key, values in side_by_side.items() if any(one != values[0] for one in values)},
        "metrics": {name: [one[name].as_json() if name in one else None for one in curves] for name in names},
    }


def seconds_of(job: Json) -> float | None:
    """Return how long a job ran, by the cloud's clock; None while it runs."""
    return None if job["ended_s"] is None else float(job["ended_s"]) - float(job["created_s"])


def _ordered(names: Iterable[str]) -> list[str]:
    """Return names of metrics, those that tell most first; otherwise in the order in which they came."""

    def rank(name: str) -> tuple[bool, bool, bool]:
        plain = name.removeprefix(ON_DEVICES).rpartition("/")[2] if name.startswith(ON_DEVICES) else name
        return plain in LOSSES, name == "train_loss", name.startswith(ON_DEVICES)

    return sorted(names, key=rank)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        key = f"{prefix}{name}"
        found += _flat(value, f"{key}.") if isinstance(value, Mapping) and value else [(key, value)]
    return [(key, value) for key, value in found if key != "train.round" and value != {}]
