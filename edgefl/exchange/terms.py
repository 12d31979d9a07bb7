"""How many devices are waited for, and for how long: before an exchange and in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgefl.config import RoundsConfig

RETURN_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """When devices are given up. Durations in seconds, none of which runs while answers cannot be stored."""

    deadline_s: float  # of the whole exchange, from its beginning
    offline_grace_s: float  # for devices that are offline, once the quorum is there
    quorum: int = 0  # so many updates
    return_s: float = RETURN_S  # more, for a device that was not heard of since the asking side started

    @classmethod
    def of_round(cls, rounds: RoundsConfig, deadline_s: float) -> Terms:
        """Return the terms of one round of training."""
        return cls(deadline_s=deadline_s, offline_grace_s=rounds.offline_grace_s, quorum=rounds.quorum)


def gathering(rounds: RoundsConfig, *, is_first: bool) -> tuple[tuple[int, float], tuple[int, float]]:
    """Return how many clients are waited for before a round, each with its seconds: all wanted, then the quorum.

    The first round of a job waits for all its time; a later one does not hold up those that are there.
    """
    first_s = rounds.wait_s if is_first else min(rounds.offline_grace_s, rounds.wait_s)
    return (max(rounds.clients, rounds.quorum), first_s), (rounds.quorum, rounds.wait_s - first_s)


def cohort_size(rounds: RoundsConfig) -> int:
    """Return how many clients a round asks, over-selection included; 0 = all there are."""
    return math.ceil(round(rounds.clients * (1 + rounds.over_selection), 6))  # 100 * 1.1 is 110.00000000000001
