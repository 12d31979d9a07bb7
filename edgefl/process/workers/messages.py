"""Messages that all workers send, and the error for a lost worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker's first message: it is ready, or why it cannot start."""

    fault: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and the worker's peak memory so far."""

    answer: Any
    peak_rss_mb: float


class WorkerLost(Exception):
    """A worker will not answer any more. Its text says how it ended, e.g. `was ended by SIGKILL`."""


class WorkerStart(Protocol):
    """The start data of a worker process, pickled."""

    def begin(self) -> Callable[[Any], Any]:
        """Load what is needed, in the worker; return the function that answers messages (None: no answer).

        Raises EdgeflError if that fails, which is reported to the pool.
        """
