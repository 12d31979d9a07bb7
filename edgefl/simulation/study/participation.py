"""How often each client took part: one counter a client, 4 bytes each, so that a million of them are nothing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.uint32]  # (clients,) rounds in which each was admitted


def no_counts(num_clients: int) -> Counts:
    """Return a zero for each client; pages that nobody touches take no memory."""
    return np.zeros(num_clients, np.uint32)


def count(counts: Counts, positions: Iterable[int]) -> None:
    """Count one round's clients, by their position in the population."""
    np.add.at(counts, np.fromiter(positions, np.int64), 1)


def clients_by_rounds(counts: Counts) -> dict[str, int]:
    """Return how many clients took part in how many rounds: {"0": 900, "1": 100}."""
    rounds, clients = np.unique(counts, return_counts=True)
    return {str(number): int(many) for number, many in zip(rounds.tolist(), clients.tolist(), strict=True)}
