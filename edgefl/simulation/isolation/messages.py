"""What a simulation's own process and the command say to each other over a pipe, pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgefl.records import RoundReport
from edgefl.simulation.study.checkpoint import Checkpoint
from edgefl.simulation.study.report import SimulationResult
from edgefl.simulation.world.settings import SimulationConfig
from edgefl.trees import Tree


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is to be simulated, and from where on."""

    task: str
    engine: str
    config: SimulationConfig
    data: Mapping[str, str] = field(default_factory=dict)
    evaluate_every: int = 1
    checkpoint: Path | None = None
    checkpoint_every: int = 1
    resume: Path | None = None
    address: str | None = None
    going_on: Checkpoint | None = None
    failed: Mapping[str, str] = field(default_factory=dict)  # clients that are not to be tried again, and why


@dataclass(frozen=True, slots=True)
class Chose:
    """The engine that was chosen, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundDone:
    """A round, and the state after it: of the parameters those that are new, all rounds in the first one alone."""

    outcome: RoundReport
    state: Checkpoint | None


@dataclass(frozen=True, slots=True)
class SimulationFinished:
    """What it came to; where a round ended under its quorum, why."""

    result: SimulationResult
    cut_short: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """An error of our tree: the name of its class, and what it says."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class SimulationInterrupted:
    """Ctrl-C, for the second time."""


End = SimulationFinished | Refused | SimulationInterrupted
Message = Chose | RoundDone | End


class OnlyNew:
    """Leaves out the arrays that were handed on before: a frozen part travels once."""

    def __init__(self) -> None:
        self._known: Tree = {}
        self.first = True

    def of(self, parameters: Tree) -> Tree:
        """Return those of a tree that are other arrays than in the one before."""
        new = {name: array for name, array in parameters.items() if array is not self._known.get(name)}
        self._known, self.first = dict(parameters), False
        return new
