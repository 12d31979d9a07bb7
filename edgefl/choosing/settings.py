"""The settings of `[rounds]` about choosing, sharing and stopping, and their checks."""

from __future__ import annotations

from dataclasses import dataclass

from edgefl.errors import ConfigError
from edgefl.terminal.bounds import MAX_RATE, require_within

UTILITIES = ("random", "oort")
DIRECTIONS = ("auto", "max", "min")
MAX_PRIORITY, LEAST_WEIGHT, MAX_WEIGHT = 1000, 0.01, 100.0
MAX_PATIENCE = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StopConfig:
    """When a job ends before its last round: at a value of a metric, or when the metric no longer improves."""

    metric: str = ""  # e.g. accuracy, devices/accuracy, train_loss; empty = all rounds are run
    at: float | None = None  # stop when the metric is at least as good as this
    patience: int = 0  # stop after so many rounds without an improvement; 0 = never
    min_change: float = 0.0  # a smaller change is no improvement
    direction: str = "auto"  # max: higher is better; min: lower is better; auto: as the task says

    def __post_init__(self) -> None:
        if not self.metric.isprintable() or len(self.metric) > 200:
            raise ConfigError(
                f"rounds.stop.metric={self.metric[:200]!r} must be printable, and of 200 characters at most"
            )
        if self.direction not in DIRECTIONS:
            raise ConfigError(f"rounds.stop.direction={self.direction!r} is not one of: {', '.join(DIRECTIONS)}")
        require_within("rounds.stop.patience", self.patience, 0, MAX_PATIENCE)
        require_within("rounds.stop.min_change", self.min_change, 0, MAX_RATE)
        if self.at is not None:
            require_within("rounds.stop.at", self.at, -MAX_RATE, MAX_RATE)
        has_condition = self.at is not None or self.patience > 0
        if has_condition and not self.metric:
            raise ConfigError("rounds.stop has no metric: add rounds.stop.metric")
        if self.metric and not has_condition:
            raise ConfigError(
                f"rounds.stop.metric={self.metric!r} has no condition: add rounds.stop.at or rounds.stop.patience"
            )


def check_choice(utility: str, clients: int, fairness: float) -> None:
    """Raise ConfigError for settings of the choice of a cohort that cannot be used."""
    if utility not in UTILITIES:
        raise ConfigError(f"rounds.utility={utility!r} is not one of: {', '.join(UTILITIES)}")
    if utility != "random" and not clients:
        raise ConfigError(
            f"rounds.utility={utility!r} chooses among devices, but rounds.clients=0 asks all; set rounds.clients"
        )
    require_within("rounds.fairness", fairness, 0, 1)


def check_share(priority: int, weight: float) -> None:
    """Raise ConfigError for a job's priority or weight out of bounds."""
    require_within("rounds.priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
    require_within("rounds.weight", weight, LEAST_WEIGHT, MAX_WEIGHT)
