"""Early stop: a job ends before its last round, when a metric is good enough or no longer improves.

The metrics are those of the rounds, deployed and simulated alike. A metric that an operator's `edgefl run` evaluates
reaches the cloud after its round, so that a deployed job may stop a round later than a simulation.
Invariant: the decision depends on the metrics alone, so that a job that continues after a restart decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgefl.aggregation.directions import direction_of_name
from edgefl.choosing.settings import StopConfig
from edgefl.errors import ConfigError


class EarlyStop:
    """Whether a job has reached its end, from the metrics of its rounds."""

    def __init__(self, config: StopConfig) -> None:
        self._config, self._higher = config, _is_higher_better(config)
        self._values: dict[int, float] = {}  # round -> the metric

    def note(self, round_number: int, metrics: Mapping[str, float | None]) -> None:
        """Take in metrics of the model after a round; others than the one to stop at are ignored."""
        value = metrics.get(self._config.metric)
        if value is not None:
            self._values[round_number] = value

    def reason(self) -> str:
        """Return why the job is to stop; empty if it is not."""
        config, name = self._config, self._config.metric
        best, best_round = math.nan, 0
        for number in sorted(self._values):
            value = self._values[number]
            if not math.isfinite(value):
                continue
            if config.at is not None and (value >= config.at if self._higher else value <= config.at):
                return f"{name} is {value:.6g} after round {number}, which reaches rounds.stop.at={config.at:g}"
            gain = value - best if self._higher else best - value
            if not best_round or gain > config.min_change:
                best, best_round = value, number
        last = max(self._values, default=0)
        if config.patience and best_round and last - best_round >= config.patience:
            return f"{name} has not improved since round {best_round} ({best:.6g}); it is round {last}"
        return ""


def make_stop(config: StopConfig) -> EarlyStop | None:
    """Return the early stop of a job; None without one. Raises ConfigError if the metric's direction is not known."""
    return EarlyStop(config) if config.metric else None


def _is_higher_better(config: StopConfig) -> bool:
    if config.direction != "auto":
        return config.direction == "max"
    higher = direction_of_name(config.metric)
    if higher is None:
        raise ConfigError(
            f"rounds.stop.metric={config.metric!r}: nothing says whether higher is better. Add rounds.stop.direction: "
            "max if it is, else min"
        )
    return higher
