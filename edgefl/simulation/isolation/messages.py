"""Messages between the command and the simulation's own process, pickled over a pipe."""

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
    """What to simulate, and from which state."""

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
    failed: Mapping[str, str] = field(default_factory=dict)  # clients that must not be tried again, and why


@dataclass(frozen=True, slots=True)
class Chose:
    """The engine that was chosen, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundDone:
    """A round and the state after it: only the changed parameters; earlier rounds only in the first message."""

    outcome: RoundReport
    state: Checkpoint | None


@dataclass(frozen=True, slots=True)
class SimulationFinished:
    """The result; if a round ended below its quorum, the reason."""

    result: SimulationResult
    cut_short: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """An edgefl error: the name of its class, and its message."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class SimulationInterrupted:
    """The second Ctrl-C."""


End = SimulationFinished | Refused | SimulationInterrupted
Message = Chose | RoundDone | End


class OnlyNew:
    """Leaves out arrays that were already sent: a frozen part is sent once."""

    def __init__(self) -> None:
        self._known: Tree = {}
        self.first = True

    def of(self, parameters: Tree) -> Tree:
        """Return the arrays of a tree that differ from the previous tree's arrays."""
        new = {name: array for name, array in parameters.items() if array is not self._known.get(name)}
        self._known, self.first = dict(parameters), False
        return new
