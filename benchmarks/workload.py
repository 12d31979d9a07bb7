"""Workload and result of a run of rounds, the same for edgefl, Flower and the lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TENSORS = 4  # of equal size; few, because each costs Flower time


class RunFailedError(RuntimeError):
    """A run without a result; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """K clients that return the model unchanged, without training."""

    clients: int
    megabytes: float  # 10^6 bytes of float32

    @property
    def model_bytes(self) -> int:
        return round(self.megabytes * 1e6) // (4 * TENSORS) * (4 * TENSORS)

    def __str__(self) -> str:
        return f"{self.clients} x {self.megabytes:g} MB"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """The measurements of one run."""

    first_s: float  # the first round, with all starts in it
    round_s: tuple[float, ...]  # the rounds after it
    centre_mb: float | None = None  # peak resident memory of the server's processes
    idle_mb: float | None = None  # resident memory of a device's processes, connected, before any job


def between(ends_s: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Return the first interval and the others."""
    seconds = tuple(after - before for before, after in pairwise(ends_s))
    return seconds[0], seconds[1:]
