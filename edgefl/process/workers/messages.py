"""What every worker says, whatever it is for, and how it says that it is gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Ready:
    """The first thing that a worker says: it can be asked now, or why it never can."""

    fault: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and the most memory that the worker has held so far."""

    answer: Any
    peak_rss_mb: float


class WorkerLost(Exception):
    """A worker will not answer any more. Its text says how it ended, e.g. `was ended by SIGKILL`."""


class WorkerStart(Protocol):
    """What a worker process is started with, pickled."""

    def begin(self) -> Callable[[Any], Any]:
        """Load what is needed, in the worker; return what answers a message, None where none is expected.

        Raises EdgeflError where it cannot: the pool is told.
        """
