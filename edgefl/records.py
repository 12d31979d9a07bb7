"""The records of a round: plan, update, failure, partial sum, outcome; and how often each client took part.

They are frozen and validate themselves. Participation is one counter of 4 bytes per client, so a million clients
take 4 MB. An idle agent has this module in memory, so it imports no numpy until clients are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgefl.trees import Tree

CLOUD = "cloud"  # name of the top tier

Counts: TypeAlias = "npt.NDArray[np.uint32]"  # (clients,) rounds in which each was admitted


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a round asks of its clients."""

    job: str
    round: int  # from 1
    parameters: Tree  # all tensors that change: those that are trained, and the buffers
    clients: tuple[str, ...]  # the cohort
    train: TrainConfig
    deadline_s: float  # a duration from the announcement, not a time of day
    frozen: Tree | None = None  # the model's other tensors, which do not change; None = not known
    evaluate: bool = False  # whether clients also evaluate `parameters`, on their own held-out samples
    fit: bool = True  # False: clients only evaluate
    owed: tuple[str, ...] = ()  # clients whose update of the round before is also taken, if it comes in this one


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """Which metrics the devices of a job report in federated evaluation."""

    directions: Mapping[str, bool | None]  # metric -> whether higher is better; None = unknown
    declared: bool = True  # whether these are all metrics; False: the task's own function names them


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceEvaluation:
    """What one device measured of the parameters that it received, on its own held-out samples; or why nothing."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    weight: float = 0.0  # usually the number of samples
    fault: str = ""  # why it has no metrics; empty = it has


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluations:
    """The evaluations of several devices."""

    values: Mapping[str, tuple[Sequence[float], Sequence[float]]]  # metric -> values and weights, one each per device
    count: int  # devices that evaluated
    faults: Mapping[str, str]  # device -> why its evaluation does not count


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What one client sends back. `tree` is a delta (new - old) or a gradient, as the plan asked."""

    job: str
    round: int
    device: str
    tree: Tree
    weight: float  # usually the number of samples
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: DeviceEvaluation | None = None  # if the plan asked for one


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """What a client sends back if a plan only asks to evaluate."""

    job: str
    round: int
    device: str
    evaluation: DeviceEvaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A client that answered, but not with an update."""

    job: str
    round: int
    device: str
    reason: str
    refused: bool = False  # it sent one, and the guard of its region refused it


@dataclass(frozen=True, kw_only=True, slots=True)
class Partial:
    """A weighted sum in float64, with the names of its contributors; or their weighted mean, which a region sends."""

    total: Tree
    weight: float
    contributors: tuple[str, ...]
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # (sum of weight * value, of weights)
    evaluations: Evaluations | None = None  # if the plan asked for them; checked by whoever sends them
    device_evaluations: Mapping[str, DeviceEvaluation] = field(default_factory=dict)  # the same, not checked
    weights: Mapping[str, float] = field(default_factory=dict)  # of each contributor, if it is known
    losses: Mapping[str, float] = field(default_factory=dict)  # metric `train_loss` of contributors, if known
    regions: Mapping[str, RegionRound] = field(default_factory=dict)  # those that have made it, if known
    is_mean: bool = False  # whether `total` is the mean, in the dtypes of `guards.partial_spec`


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionRound:
    """A region's part in one round: the devices that it has answered for, and what its own round took."""

    parent: str  # the cloud, or the region above
    admitted: tuple[str, ...] = ()  # those connected to it directly, not through a region below it
    failures: Mapping[str, str] = field(default_factory=dict)  # of the others of these devices: why
    seconds: float = 0.0  # from its work to its sum
    up_bytes: int = 0  # moved with its devices, and the regions below it
    down_bytes: int = 0

    def __add__(self, more: RegionRound) -> RegionRound:
        """Return both parts of one round, e.g. two sums of a region."""
        return RegionRound(
            parent=self.parent, admitted=(*self.admitted, *more.admitted),
            failures={**self.failures, **more.failures}, seconds=max(self.seconds, more.seconds),
            up_bytes=self.up_bytes + more.up_bytes, down_bytes=self.down_bytes + more.down_bytes,
        )  # fmt: skip


Answer = Update | Failure | Partial | Evaluated  # what a fleet yields for a plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes that a fleet has transferred since its creation."""

    up_bytes: int = 0
    down_bytes: int = 0

    def __add__(self, more: Traffic) -> Traffic:
        return Traffic(up_bytes=self.up_bytes + more.up_bytes, down_bytes=self.down_bytes + more.down_bytes)

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(up_bytes=self.up_bytes - before.up_bytes, down_bytes=self.down_bytes - before.down_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenUpdate:
    """What is remembered of one admitted update, to choose later cohorts."""

    weight: float
    loss: float | None = None  # its metric `train_loss`, if it has one
    seconds: float | None = None  # from the round's start to its arrival; None = not known, after a restart


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundOutcome:
    """The result of a round, and the parameters after it."""

    job: str
    round: int
    parameters: Tree
    admitted: tuple[str, ...]
    rejected: Mapping[str, str]  # device -> why a guard refused its update
    failed: Mapping[str, str]  # device -> why it sent no update
    missing: tuple[str, ...]  # no answer before the round's end
    weight: float  # sum over the admitted
    metrics: Mapping[str, float]  # weighted means over the admitted; `devices/..` of the parameters before the round
    seconds: float
    up_bytes: int
    down_bytes: int
    not_evaluated: Mapping[str, str] = field(default_factory=dict)  # device -> why its evaluation does not count
    seen: Mapping[str, SeenUpdate] = field(default_factory=dict)  # device -> its admitted update
    regions: Mapping[str, RegionRound] = field(default_factory=dict)  # by their sums
    late: tuple[str, ...] = ()  # devices whose update of the round before is part of this one; not in `admitted`

    def cohort(self) -> tuple[str, ...]:
        """Return all devices that were asked, and those that were refused."""
        return tuple(dict.fromkeys([*self.admitted, *self.rejected, *self.failed, *self.missing]))

    def report(self) -> RoundReport:
        """Return the public report of this round."""
        return RoundReport(
            round=self.round,
            admitted=len(self.admitted),
            rejected=len(self.rejected),
            failed=len(self.failed),
            missing=len(self.missing),
            reasons={**self.rejected, **self.failed},
            seconds=self.seconds,
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
            metrics=dict(self.metrics),
            not_evaluated=dict(self.not_evaluated),
            regions=self._regions(),
            late=len(self.late),
        )

    def _regions(self) -> Mapping[str, RegionRound]:
        """Return the parts of the regions, and of the cloud itself: empty in a round without regions."""
        if not self.regions:
            return {}
        below = {name for one in self.regions.values() for name in (*one.admitted, *one.failures)}
        own = RegionRound(
            parent="", admitted=tuple(one for one in self.admitted if one not in below),
            failures={one: why for one, why in {**self.rejected, **self.failed}.items() if one not in below},
            seconds=self.seconds, up_bytes=self.up_bytes, down_bytes=self.down_bytes,
        )  # fmt: skip
        return {CLOUD: own, **self.regions}


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """A finished round in a result, the same for a run on a fleet, a simulation and a Flower app."""

    round: int
    admitted: int  # number of clients, as in the next three
    rejected: int  # a guard refused the update
    failed: int  # answered without an update
    missing: int  # no answer before the round's end
    reasons: Mapping[str, str]  # client -> why it was rejected, or failed
    seconds: float
    up_bytes: int
    down_bytes: int
    metrics: Mapping[str, float]
    virtual_seconds: float | None = None  # in virtual time, if the simulation has it
    virtual_end_s: float | None = None  # since the simulation's first round, in virtual time
    model: str | None = None  # on a fleet: SHA-256 of the parameters after it
    frozen: str | None = None  # SHA-256 of the frozen tensors, if `model` lacks them
    not_evaluated: Mapping[str, str] = field(default_factory=dict)  # client -> why its evaluation does not count
    regions: Mapping[str, RegionRound] = field(default_factory=dict)  # on a fleet with regions; `cloud` is the top
    late: int = 0  # updates of the round before, which came when it was over

    def counts_text(self) -> str:
        """Return `3 admitted, 1 failed`: the counts above 0."""
        others = {"rejected": self.rejected, "failed": self.failed, "missing": self.missing, "late": self.late}
        return ", ".join([f"{self.admitted} admitted", *(f"{count} {name}" for name, count in others.items() if count)])

    def as_json(self) -> dict[str, Any]:
        """Return the round as public JSON: counts and reasons, without missing values."""
        said = {one.name: getattr(self, one.name) for one in fields(self)}
        del said["not_evaluated"], said["regions"], said["late"]
        return {name: value for name, value in said.items() if value is not None} | {
            "reasons": dict(self.reasons), "metrics": dict(self.metrics),
            **({"not_evaluated": dict(self.not_evaluated)} if self.not_evaluated else {}),
            **({"regions": {name: asdict(one) for name, one in self.regions.items()}} if self.regions else {}),
            **({"late": self.late} if self.late else {}),
        }  # fmt: skip

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> RoundReport:
        """Read the result of `as_json`; ignores other keys. Raises ProtocolError for anything else.

        A metric that is null, because it was not a finite number, is NaN.
        """
        known = {one.name: said[one.name] for one in fields(cls) if one.name in said}
        regions = known.get("regions", {})
        try:
            known["metrics"] = {name: math.nan if one is None else one for name, one in said["metrics"].items()}
            known["regions"] = {
                name: RegionRound(**{**one, "admitted": tuple(one["admitted"])}) for name, one in regions.items()
            }
            return cls(**known)
        except (AttributeError, KeyError, TypeError) as cause:
            raise ProtocolError(f"not a round: {cause!r}") from cause


def no_counts(num_clients: int) -> Counts:
    """Return one zero per client; memory pages that are never written take no space."""
    import numpy as np

    return np.zeros(num_clients, np.uint32)


def count_clients(counts: Counts, positions: Iterable[int]) -> None:
    """Add one to the counters of a round's clients, given by their positions in the population."""
    import numpy as np

    np.add.at(counts, np.fromiter(positions, np.int64), 1)


def clients_by_rounds(counts: Counts) -> dict[str, int]:
    """Return how many clients took part in how many rounds: {"0": 900, "1": 100}."""
    import numpy as np

    rounds, clients = np.unique(counts, return_counts=True)
    return {str(number): int(many) for number, many in zip(rounds.tolist(), clients.tolist(), strict=True)}
