"""The result of a simulation: as public JSON, a pandas frame, a figure."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefl.errors import JobFailed, MissingExtra
from edgefl.process.home import replace_file
from edgefl.records import Counts, RoundReport, clients_by_rounds, no_counts
from edgefl.rounds import LastEvaluation
from edgefl.simulation.screen.plot import draw_rounds
from edgefl.trees import Tree, write_tree

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationResult:
    """The finished rounds, the last model, and the durations."""

    task: str
    engine: str
    engine_reason: str
    rounds: Sequence[RoundReport]
    final: Mapping[str, float]  # metrics of the last parameters; `devices/..`: evaluated after the last round
    seconds: float  # total: choice of the engine, rounds, evaluation
    round_seconds: float  # only the rounds
    peak_rss_mb: float  # including worker processes
    parameters: Tree
    model: Json  # sha256, and the path if it was written
    virtual_seconds: float | None = None  # virtual time, if devices are configured
    interrupted: bool = False  # ended before its last round
    stopped: str = ""  # why `rounds.stop` ended it before its last round
    last_evaluation: LastEvaluation = field(default_factory=LastEvaluation)  # by the devices, after the last round
    took_part: Counts = field(
        default_factory=lambda: no_counts(0)
    )  # number of rounds of each client, in the order of the names
    tiers: Sequence[Mapping[str, int]] = ()  # what the links of each tier carried, if there are regions

    @property
    def clients_per_second(self) -> float:
        """Admitted clients per second of the rounds."""
        admitted = sum(one.admitted for one in self.rounds)
        return admitted / self.round_seconds if self.round_seconds > 0 else 0.0

    def as_json(self) -> Json:
        """Return the result with the keys common to all engines."""
        return {
            "task": self.task,
            "engine": self.engine,
            "engine_reason": self.engine_reason,
            "rounds": [one.as_json() for one in self.rounds],
            "final": dict(self.final),
            **({"last_evaluation": last.as_json()} if (last := self.last_evaluation) != LastEvaluation() else {}),
            "seconds": self.seconds,
            "round_seconds": self.round_seconds,
            "virtual_seconds": self.virtual_seconds,
            "clients_per_second": self.clients_per_second,
            "peak_rss_mb": self.peak_rss_mb,
            "model": self.model,
            "interrupted": self.interrupted,
            **({"stopped": self.stopped} if self.stopped else {}),
            "clients_by_rounds": clients_by_rounds(self.took_part),
            **({"tiers": list(self.tiers)} if self.tiers else {}),
        }

    def to_frame(self) -> pandas.DataFrame:
        """Return a frame with one row per round, the metrics as columns; needs pandas."""
        try:
            import pandas as pd
        except ImportError as cause:
            raise MissingExtra("a frame of the rounds", "sim") from cause
        rows = frame_rows(self.rounds)
        return pd.DataFrame(rows).set_index("round") if rows else pd.DataFrame()

    def figure(self) -> Figure:
        """Draw accuracy, loss and bytes over rounds and over time, and participation; needs matplotlib."""
        return draw_rounds({self.task: self.rounds}, {self.task: self.took_part}, {self.task: self.final})


class CutShort(JobFailed):
    """A simulation ended by a round below its quorum, or with a failed step; `so_far` is the result before that round.

    Its `__cause__` is the QuorumNotMet or StepFailed that ended it.
    """

    def __init__(self, reason: str, so_far: SimulationResult) -> None:
        super().__init__(reason)
        self.so_far = so_far


class ProcessLost(JobFailed):
    """A simulation whose process ended twice; `so_far` is the result of its rounds, if there were any."""

    def __init__(self, reason: str, so_far: SimulationResult | None) -> None:
        super().__init__(reason)
        self.so_far = so_far


def model_of(parameters: Tree, out: Path | None) -> Json:
    """Return a model's `sha256` and `path`; writes it if `out` is given."""
    file = io.BytesIO()
    write_tree(parameters, file)
    data = file.getvalue()
    if out is not None:
        replace_file(out, data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "path": str(out) if out is not None else None}


def frame_rows(rounds: Sequence[RoundReport]) -> list[Json]:
    """Return one flat row per round: counts and metrics, without the reasons."""
    return [
        {k: v for k, v in one.as_json().items() if k not in {"metrics", "reasons", "not_evaluated"}} | dict(one.metrics)
        for one in rounds
    ]
