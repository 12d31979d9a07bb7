"""What a pool and its workers say to each other over a pipe, pickled; parameters and sums lie in shared memory."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass, field

from edgefl.errors import ConfigError
from edgefl.records import Failure, Partial, Plan, Update
from edgefl.simulation.engines.fleets import SimulationSetup, TrainingMethod
from edgefl.task import Task


@dataclass(frozen=True, slots=True)
class BeginRound:
    """A round begins: take the tensors from where they lie (the plan has none), and forget what is summed."""

    plan: Plan
    sums: bool  # whether updates are summed in the worker, or sent one by one
    method: TrainingMethod = field(default_factory=TrainingMethod)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Train these clients."""

    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flush:
    """Give the sum, say who is in it, and begin a new one."""


@dataclass(frozen=True, slots=True)
class Try:
    """Try whether clients can be trained in stacks. The user's code runs in it, so it is a worker's to do."""

    method: TrainingMethod


@dataclass(frozen=True, slots=True)
class Tried:
    """The answer to Try: why not, or None."""

    why_not: str | None


@dataclass(frozen=True, slots=True)
class Done:
    """A chunk is trained. Where updates are summed, its answers come with the sum."""

    answers: tuple[Update | Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Summed:
    """The answer to Flush. Failures, and what a guard refuses, stand aside."""

    partial: Partial | None
    aside: tuple[Update | Failure, ...] = ()
    fault: str = ""  # of stacks, whose clients were trained one by one instead


def pickled_task(setup: SimulationSetup) -> bytes | None:
    """Return the task for workers, or None where they can load it; raises ConfigError where they can do neither."""
    if setup.reference is not None:
        return None
    try:
        data = pickle.dumps(setup.task)
    except (pickle.PicklingError, AttributeError, TypeError) as cause:
        raise ConfigError(_unsendable(setup.task, str(cause))) from cause
    if b"__main__" in data:
        raise ConfigError(_unsendable(setup.task, "it is defined in __main__"))
    return data


def _unsendable(task: Task, why: str) -> str:
    return (
        f"task {task.name!r} cannot be sent to worker processes: {why}. Put it into a module or a folder and name "
        "that, or use the engine 'loop' or 'stacked'."
    )


def import_path() -> tuple[str, ...]:
    """Return where this process finds modules, for the workers."""
    return tuple(str(entry) for entry in sys.path)
