"""How many devices are waited for, and for how long, before an exchange and during it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgefl.config import GRACE_AUTO, GRACE_NONE, RoundsConfig
from edgefl.exchange.durations import Durations, Expectation

RETURN_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """When devices are given up. Durations in seconds; they stand still in a pause of the storage."""

    deadline_s: float  # of the whole exchange, from its start
    offline_grace_s: float  # for offline devices, after the quorum has sent updates
    quorum: int = 0  # number of updates
    return_s: float = RETURN_S  # more, for a device without a message since the asking side started
    grace_s: float = math.inf  # for all missing devices, after the guard has admitted updates of the quorum
    expected: Mapping[str, Expectation] | None = None  # when devices are expected; None = `grace_s` counts

    @classmethod
    def of_round(
        cls, rounds: RoundsConfig, deadline_s: float, asked: Iterable[str] = (), durations: Durations | None = None
    ) -> Terms:
        """Return the terms of one round of training; `durations` are those of the job's earlier rounds."""
        expected = None
        if rounds.grace == GRACE_AUTO and durations is not None:
            expected = durations.expected(asked)
        return cls(
            deadline_s=deadline_s,
            offline_grace_s=rounds.offline_grace_s,
            quorum=rounds.quorum,
            grace_s=math.inf if rounds.grace in {GRACE_AUTO, GRACE_NONE} else float(rounds.grace),
            expected=expected,
        )


def gathering(rounds: RoundsConfig, *, is_first: bool) -> tuple[tuple[int, float], tuple[int, float]]:
    """Return the two waits before a round, as (number of clients, seconds): for all clients, then for the quorum.

    The first round of a job waits for all clients as long as allowed; later rounds soon start with the quorum.
    """
    first_s = rounds.wait_s if is_first else min(rounds.offline_grace_s, rounds.wait_s)
    return (max(rounds.clients, rounds.quorum), first_s), (rounds.quorum, rounds.wait_s - first_s)


def cohort_size(rounds: RoundsConfig) -> int:
    """Return the size of a round's cohort, with over-selection; 0 = all clients."""
    return math.ceil(round(rounds.clients * (1 + rounds.over_selection), 6))  # 100 * 1.1 is 110.00000000000001
