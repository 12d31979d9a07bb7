"""What a round moves, and what a run of rounds came to: the same for ours, the rival and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TENSORS = 4  # of equal size; few, since Flower pays for each


class RunFailedError(RuntimeError):
    """A run that gave no number; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """K clients that send a model there and back, without training."""

    clients: int
    megabytes: float  # 10^6 bytes of float32

    @property
    def model_bytes(self) -> int:
        return round(self.megabytes * 1e6) // (4 * TENSORS) * (4 * TENSORS)

    def __str__(self) -> str:
        return f"{self.clients} x {self.megabytes:g} MB"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What one run measured."""

    first_s: float  # the first round, with what starts in it
    round_s: tuple[float, ...]  # the rounds after it
    centre_mb: float | None = None  # peak resident memory of the centre's processes
    idle_mb: float | None = None  # resident memory of a device's processes, connected, before any job


def between(ends_s: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    """Return the first interval and the others."""
    seconds = tuple(after - before for before, after in pairwise(ends_s))
    return seconds[0], seconds[1:]
