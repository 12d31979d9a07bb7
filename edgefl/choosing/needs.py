"""What the configuration of rounds needs to know of clients, so that nothing is kept that nobody reads."""

from __future__ import annotations

from edgefl.choosing.expression import parse
from edgefl.choosing.facts import LEARNT
from edgefl.config import RoundsConfig


def reads_history(rounds: RoundsConfig) -> bool:
    """Whether cohorts depend on what single clients did in earlier rounds."""
    return rounds.utility == "oort" or bool(rounds.select and {*parse(rounds.select).fields} & LEARNT.keys())
