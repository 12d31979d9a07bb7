"""When a plan is replaced: link and load change all the time, and a change of cut costs.

Another option is chosen only if it is better by a margin, and has been for a number of looks in a row; for some time
after a change nothing is changed again. If the current option becomes impossible, there is a change at once.
No clock: the caller says what time it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgefl.errors import ConfigError
from edgefl.offload.plans.link import LinkSpeed
from edgefl.offload.plans.planner import OBJECTIVES, PlanLimits, Prediction, SplitOption, predict, ranked


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplanRules:
    """How reluctant a change is."""

    margin: float = 0.1  # the new option must be better by this share
    looks: int = 3  # in a row
    rest_s: float = 30.0  # after a change

    def __post_init__(self) -> None:
        if not (0 <= self.margin < 1 and self.looks >= 1 and 0 <= self.rest_s < math.inf):
            raise ConfigError(f"margin must be in 0..1, looks at least 1, rest_s finite and not negative: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedModel:
    """What a device knows of a model: the options that its release allows, and each layer's time."""

    options: Sequence[SplitOption]
    device_ms: Sequence[float]
    cloud_ms: Sequence[float]
    objective: str = "latency"
    limits: PlanLimits = field(default_factory=PlanLimits)
    encoding_factor: float = 1.0

    def predictions(self, link: LinkSpeed, device_load: float = 1.0, cloud_load: float = 1.0) -> list[Prediction]:
        """Return each option's cost; a load of 2 = each layer takes twice as long as it was measured."""
        return predict(
            self.options,
            [one * device_load for one in self.device_ms],
            [one * cloud_load for one in self.cloud_ms],
            link,
            encoding_factor=self.encoding_factor * device_load,
        )


class Replanner:
    """The current option, and when it is replaced."""

    def __init__(self, model: PlannedModel, rules: ReplanRules | None = None) -> None:
        self._model, self._rules = model, rules or ReplanRules()
        self._current: SplitOption | None = None
        self._wins, self._changed_s = 0, -math.inf

    @property
    def current(self) -> SplitOption | None:
        """The option in use; None before the first look."""
        return self._current

    def look(self, now_s: float, link: LinkSpeed, *, device_load: float = 1.0, cloud_load: float = 1.0) -> SplitOption:
        """Return the option to use from now on, with what was just measured.

        Raises ConfigError if no option is within the limits; then the current one stays.
        """
        everything = self._model.predictions(link, device_load, cloud_load)
        best, *_ = ranked(everything, self._model.objective, self._model.limits)
        now = next((one for one in everything if one.option == self._current), None)
        if now is None or self._model.limits.refusal(now):
            return self._change(best, now_s)
        is_better = (
            best.option != now.option and _gain(OBJECTIVES[self._model.objective], best, now) > self._rules.margin
        )
        self._wins = self._wins + 1 if is_better else 0
        if self._wins >= self._rules.looks and now_s - self._changed_s >= self._rules.rest_s:
            return self._change(best, now_s)
        return now.option

    def _change(self, to: Prediction, now_s: float) -> SplitOption:
        self._current, self._wins, self._changed_s = to.option, 0, now_s
        return to.option


def _gain(key: Callable[[Prediction], float], best: Prediction, now: Prediction) -> float:
    """Return by what share the best option is better."""
    before, after = key(now), key(best)
    if before == after:
        return 0.0
    return (before - after) / abs(before) if before and math.isfinite(before) else math.inf
