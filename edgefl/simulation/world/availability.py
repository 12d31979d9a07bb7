"""When devices can take part: always, by time of day, or by their battery.

Only the battery state of devices that took part is stored: the rest follows from a device's phase,
which is drawn by (seed, device).
Invariant: `available(i, t)` and `until_s(i, t)` agree: a device available at t stays available until then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgefl.errors import ConfigError
from edgefl.simulation.world.draws import Floats, Indices, uniforms

Mask = npt.NDArray[np.bool_]

KINDS = ("always", "diurnal", "battery")


@dataclass(frozen=True, kw_only=True, slots=True)
class AvailabilityConfig:
    """always; diurnal: once per period, for `share` of it; battery: charges for `share`, then discharges.

    A device's window is centred on `centre_s`, shifted by up to `scatter` / 2 of a period in either direction.
    """

    kind: str = "always"  # always | diurnal | battery
    dropout: float = 0.0  # the fraction of trainings in which a device goes offline, for every kind
    period_s: float = 86_400.0  # a day
    share: float = 1 / 3  # of the period in which a device can take part, or charges
    centre_s: float = 10_800.0  # 3 a.m., when phones charge
    scatter: float = 0.25  # 1 = spread over the whole period
    low: float = 0.1  # battery: level at the end of a period without training
    min_level: float = 0.5  # battery: no training below this level, unless charging
    drain_per_hour: float = 0.2  # battery: drain of an hour of training

    def __post_init__(self) -> None:
        where = "population.devices.availability"
        if self.kind not in KINDS:
            raise ConfigError(f"{where}.kind={self.kind!r} is not one of: {', '.join(KINDS)}")
        for name in ("dropout", "scatter", "low", "min_level"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{where}.{name}={getattr(self, name)} must be in 0..1")
        if not 0 < self.share <= 1:
            raise ConfigError(f"{where}.share={self.share} must be above 0 and at most 1")
        if not 0 < self.period_s < math.inf:
            raise ConfigError(f"{where}.period_s={self.period_s} must be above 0 and finite")
        if not math.isfinite(self.centre_s):
            raise ConfigError(f"{where}.centre_s={self.centre_s} must be finite")
        if not 0 <= self.drain_per_hour < math.inf:
            raise ConfigError(f"{where}.drain_per_hour={self.drain_per_hour} must be 0 or more, and finite")


class Availability(Protocol):
    """When each device can take part, by its index."""

    def available(self, indices: Indices, now_s: float) -> Mask:
        """Return which of these devices are available."""

    def until_s(self, index: int, now_s: float) -> float:
        """Return when an available device becomes unavailable; infinity if never."""

    def spend(self, index: int, start_s: float, training_s: float) -> None:
        """Record that a device trained."""


def make_availability(config: AvailabilityConfig, seed: int) -> Availability:
    """Return the configured kind."""
    if config.kind == "always":
        return Always()
    return Diurnal(config, seed) if config.kind == "diurnal" else Battery(config, seed)


class Always:
    """Every device, at any time."""

    def available(self, indices: Indices, now_s: float) -> Mask:  # noqa: ARG002 - the interface's
        return np.ones(len(indices), np.bool_)

    def until_s(self, index: int, now_s: float) -> float:  # noqa: ARG002 - the interface's
        return math.inf

    def spend(self, index: int, start_s: float, training_s: float) -> None:
        """Do nothing."""


class Diurnal:
    """One window in each period."""

    def __init__(self, config: AvailabilityConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def available(self, indices: Indices, now_s: float) -> Mask:
        return self.into_s(indices, now_s) < self._open_s()

    def until_s(self, index: int, now_s: float) -> float:
        if self._config.share == 1:
            return math.inf
        return now_s + self._open_s() - float(self.into_s(np.array([index]), now_s)[0])

    def spend(self, index: int, start_s: float, training_s: float) -> None:
        """Do nothing: the device is charging."""

    def into_s(self, indices: Indices, now_s: float) -> Floats:
        """Return how long ago each device's last window opened."""
        period_s, moved = self._config.period_s, uniforms(indices, self._seed, "phase") - 0.5
        opens_s = self._config.centre_s - self._open_s() / 2 + moved * self._config.scatter * period_s
        return np.asarray((now_s - opens_s) % period_s)

    def _open_s(self) -> float:
        return self._config.share * self._config.period_s


class Battery:
    """Charges in the diurnal window; then its level falls from 1 to `low`, minus the drain by training since."""

    def __init__(self, config: AvailabilityConfig, seed: int) -> None:
        self._config = config
        self._window = Diurnal(config, seed)
        self._spent: dict[int, tuple[float, float]] = {}  # index -> (level spent, time of the next charge)

    def available(self, indices: Indices, now_s: float) -> Mask:
        charging, left_s = self._window.available(indices, now_s), self._left_s(indices, now_s)
        return np.asarray(charging | (left_s > 0))

    def until_s(self, index: int, now_s: float) -> float:
        if self._config.share == 1:
            return math.inf
        indices = np.array([index])
        if bool(self._window.available(indices, now_s)[0]):
            now_s = self._window.until_s(index, now_s)  # full, from there
            return now_s + self._lasts_s(0.0)
        return now_s + float(self._left_s(indices, now_s)[0])

    def spend(self, index: int, start_s: float, training_s: float) -> None:
        """Record a training's drain, unless the device is charging."""
        indices = np.array([index])
        if bool(self._window.available(indices, start_s)[0]):
            return
        charged_s = start_s + self._config.period_s - float(self._window.into_s(indices, start_s)[0])
        before = self._spent_at(index, start_s)
        self._spent[index] = (before + training_s / 3600 * self._config.drain_per_hour, charged_s)

    def spent(self) -> Floats:
        """Return (devices, 3): index, the level spent, the time of the next charge. For a checkpoint."""
        return np.array([(index, *spent) for index, spent in self._spent.items()], np.float64).reshape(-1, 3)

    def load(self, spent: Floats) -> None:
        """Restore the state that `spent` returned."""
        self._spent = {int(index): (level, until_s) for index, level, until_s in spent.tolist()}

    def _left_s(self, indices: Indices, now_s: float) -> Floats:
        """Return how long each device stays above `min_level` without charging."""
        full_s = self._window.into_s(indices, now_s) - self._config.share * self._config.period_s  # ago
        lasts_s = np.full(len(indices), self._lasts_s(0.0))
        if self._spent:
            for position, index in enumerate(indices.tolist()):
                if spent := self._spent_at(index, now_s):
                    lasts_s[position] = self._lasts_s(spent)
        return np.asarray(lasts_s - full_s)

    def _lasts_s(self, spent: float) -> float:
        """Return how long after a full charge the level reaches `min_level`, at most until the next charge."""
        off_s = (1 - self._config.share) * self._config.period_s
        fall = 1 - self._config.low
        above = max(0.0, 1 - spent - self._config.min_level)
        return off_s if fall == 0 and above > 0 else min(off_s, off_s * above / max(fall, 1e-9))

    def _spent_at(self, index: int, now_s: float) -> float:
        spent, until_s = self._spent.get(index, (0.0, 0.0))
        return spent if now_s < until_s else 0.0
