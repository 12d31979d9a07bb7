"""The nouns of a round: plan, update, failure, partial sum, outcome. Frozen, validated at birth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgefl.config import TrainConfig
from edgefl.trees import Tree


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a round asks of its clients."""

    job: str
    round: int  # from 1
    parameters: Tree  # what moves: all that is trained, and the buffers
    clients: tuple[str, ...]  # the cohort
    train: TrainConfig
    deadline_s: float  # a duration from the announcement, never a time of day
    frozen: Tree | None = None  # a client's other tensors, which do not move; None = not known which do not


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one client sends back. `tree` is a delta (new - old) or a gradient, as the plan asked."""

    job: str
    round: int
    device: str
    tree: Tree
    weight: float  # number of samples, as a rule
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A client that answered, but not with an update."""

    job: str
    round: int
    device: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """A weighted sum in float64, with the names of those in it: what a region sends."""

    total: Tree
    weight: float
    contributors: tuple[str, ...]
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # (sum of weight * value, of weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes a fleet has moved since it was made."""

    up_bytes: int = 0
    down_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundOutcome:
    """What a round did, and the parameters after it."""

    job: str
    round: int
    parameters: Tree
    admitted: tuple[str, ...]
    rejected: Mapping[str, str]  # device -> reason: an update that a guard refused
    failed: Mapping[str, str]  # device -> reason: no update at all
    missing: tuple[str, ...]  # no answer by the round's end
    weight: float  # sum over the admitted
    metrics: Mapping[str, float]  # weighted means over the admitted
    seconds: float
    up_bytes: int
    down_bytes: int

    def as_json(self) -> dict[str, object]:
        """The round as the public JSON shows it; counts, with the reasons beside them."""
        return {
            "round": self.round,
            "admitted": len(self.admitted),
            "rejected": len(self.rejected),
            "failed": len(self.failed),
            "missing": len(self.missing),
            "reasons": {**self.rejected, **self.failed},
            "seconds": self.seconds,
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "metrics": dict(self.metrics),
        }
