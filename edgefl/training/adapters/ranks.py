"""Which rank a client's adapters have: its own data option, the job's setting, or what the task's model has.

The rank is an argument of the task's `model`, which makes its adapters with it: `def model(rank: int = 8)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from edgefl.config import MAX_RANK, TrainConfig
from edgefl.errors import TaskError

OPTION = "lora_rank"  # a data option that is for edgefl, not for the task's loaders


def rank_of(task: str, config: TrainConfig, options: Mapping[str, str], client: str) -> int | None:
    """Return a client's rank; None = that of the task's model. Raises TaskError for an option that is no rank."""
    said = options.get(OPTION)
    if said is not None:
        if not (said.isascii() and said.isdecimal() and 0 < int(said) <= MAX_RANK):
            raise TaskError(
                f"task {task!r}: the data option {OPTION}={said!r:.40} is no rank; expected a whole number from 1 to "
                f"{MAX_RANK}. Check `edgefl agent start --data`"
            )
        return int(said)
    if not config.lora_ranks:
        return None
    place = int.from_bytes(hashlib.sha256(f"{config.seed}/rank/{client}".encode()).digest()[:7])
    return config.lora_ranks[place % len(config.lora_ranks)]


def loader_options(options: Mapping[str, str]) -> Mapping[str, str]:
    """Return the data options without edgefl's own."""
    return {name: value for name, value in options.items() if name != OPTION} if OPTION in options else options
