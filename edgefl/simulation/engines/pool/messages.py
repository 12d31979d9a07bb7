"""Messages between a pool and its workers, pickled over a pipe; parameters and sums are in shared memory."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass, field

from edgefl.errors import ConfigError
from edgefl.records import Evaluated, Failure, Partial, Plan, Update
from edgefl.simulation.engines.fleets import SimulationSetup, TrainingMethod
from edgefl.task import Task


@dataclass(frozen=True, slots=True)
class BeginRound:
    """Begin a round: use the tensors in shared memory (the plan has none), and reset the sum."""

    plan: Plan
    sums: bool  # whether updates are summed in the worker, or sent one by one
    method: TrainingMethod = field(default_factory=TrainingMethod)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Train these clients."""

    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flush:
    """Return the sum with its contributors, and begin a new one."""


@dataclass(frozen=True, slots=True)
class Try:
    """Test whether clients can be trained in stacks. A worker does this, because it runs the user's code."""

    method: TrainingMethod


@dataclass(frozen=True, slots=True)
class Tried:
    """The answer to Try: why stacks are impossible, or None."""

    why_not: str | None


@dataclass(frozen=True, slots=True)
class Done:
    """A chunk is trained. If updates are summed, its answers come with the sum."""

    answers: tuple[Update | Failure | Evaluated, ...] = ()


@dataclass(frozen=True, slots=True)
class Summed:
    """The answer to Flush. Failures and refused updates are listed separately."""

    partial: Partial | None
    aside: tuple[Update | Failure, ...] = ()
    fault: str = ""  # why stacks failed, so that clients were trained one by one


def pickled_task(setup: SimulationSetup) -> bytes | None:
    """Return the task for workers, or None if they can load it; raises ConfigError if neither is possible."""
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
        f"task {task.name!r} cannot be sent to worker processes: {why}. Put it into a module or a folder and give "
        "its name, or use the engine 'loop' or 'stacked'."
    )


def import_path() -> tuple[str, ...]:
    """Return this process's import path, for the workers."""
    return tuple(str(entry) for entry in sys.path)
