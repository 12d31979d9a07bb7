"""Metrics of the model after a round that operators evaluate, kept beside those that the round itself has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from cloud.state.store import rounds
from edgefl.errors import ConfigError

MAX_EVALUATED = 200  # evaluated metrics of one round


def round_json(row: Any) -> dict[str, Any]:
    """Return a finished round with all its metrics; `evaluated` names those that an operator measured."""
    outcome: dict[str, Any] = row["outcome"]
    if not row["evaluated"]:
        return outcome
    return outcome | {"metrics": {**outcome["metrics"], **row["evaluated"]}, "evaluated": list(row["evaluated"])}


def store_metrics(engine: sa.Engine, job: str, number: int, metrics: Mapping[str, float | None]) -> bool:
    """Add metrics of a finished round; False if it is no longer kept. Not for several threads at once.

    Raises ConfigError for more than MAX_EVALUATED names.
    """
    here = (rounds.c.job == job) & (rounds.c.round == number)
    with engine.begin() as db:
        row = db.execute(sa.select(rounds.c.evaluated).where(here)).one_or_none()
        if row is None:
            return False
        kept = {**(row.evaluated or {}), **metrics}
        if len(kept) > MAX_EVALUATED:
            raise ConfigError(
                f"round {number} of job {job} would have {len(kept)} evaluated metrics; at most {MAX_EVALUATED} are "
                "kept"
            )
        db.execute(rounds.update().where(here).values(evaluated=kept))
    return True
