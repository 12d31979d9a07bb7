"""Test doubles for code built on edgefl: a scripted fleet, and a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgefl.records import Evaluated, Failure, Plan, RoundReport, Traffic, Update
from edgefl.trees import tree_bytes

__all__ = ["ManualClock", "ScriptedFleet", "make_report", "make_update"]

ScriptedClient = Callable[[Plan], Update | Failure | Evaluated | None]


def make_report(**changes: Any) -> RoundReport:
    """Make what is told of a round: one client admitted in round 1 in a second, and what is named."""
    said: dict[str, Any] = {"round": 1, "admitted": 1, "reasons": {}, "seconds": 1.0, "metrics": {}}
    said |= dict.fromkeys(("rejected", "failed", "missing", "up_bytes", "down_bytes"), 0)
    return RoundReport(**said | changes)


def make_update(
    device: str, *, weight: float = 1.0, job: str = "job", round: int = 1, metrics: Mapping[str, float] | None = None,
    **tensors: npt.ArrayLike,
) -> Update:  # fmt: skip
    """Return an update; its tensors are given by name, and lists become float32."""
    tree = {
        name: value if isinstance(value, np.ndarray) else np.asarray(value, np.float32)
        for name, value in tensors.items()
    }
    return Update(job=job, round=round, device=device, tree=tree, weight=weight, metrics=metrics or {})


@dataclass
class ManualClock:
    """A clock that moves only by `advance`. Call it to read it, from any thread."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class ScriptedFleet:
    """A fleet with scripted clients: each is a function of the plan; None means no answer."""

    script: Mapping[str, ScriptedClient]
    plans: list[Plan] = field(default_factory=list)
    closed_early: int = 0
    _traffic: Traffic = field(default_factory=Traffic)

    def clients(self) -> Sequence[str]:
        return tuple(self.script)

    def collect(self, plan: Plan) -> Iterator[Update | Failure | Evaluated]:
        self.plans.append(plan)
        try:
            for client in plan.clients:
                answer = self.script[client](plan)
                up_bytes = tree_bytes(answer.tree) if isinstance(answer, Update) else 0
                self._traffic += Traffic(up_bytes=up_bytes, down_bytes=tree_bytes(plan.parameters))
                if answer is not None:
                    yield answer
        except GeneratorExit:
            self.closed_early += 1
            raise

    def traffic(self) -> Traffic:
        return self._traffic
