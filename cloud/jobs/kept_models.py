"""The parameters and optimizer states that are kept of a job's rounds, to continue from; and deleting older ones."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from cloud.state.blobs import BlobStore
from cloud.state.store import jobs, rounds
from edgefl.errors import ConfigError
from edgefl.protocols.messages import BlobRef


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptState:
    """What a job had after one of its rounds."""

    model: BlobRef
    optimizer_sha256: str | None
    frozen: BlobRef | None


def kept_state(engine: sa.Engine, blobs: BlobStore, job: str, number: int) -> KeptState:
    """Return a job's state after a round; raises ConfigError, with the rounds that are kept, if it is not kept."""
    finished = (rounds.c.job == job) & rounds.c.outcome.is_not(sa.null())
    with engine.begin() as db:
        found = {one.round: one for one in db.execute(rounds.select().where(finished).order_by(rounds.c.round))}
        latest = db.execute(sa.select(jobs.c.rounds_done, jobs.c.optimizer_sha256).where(jobs.c.id == job)).one()
    kept = [at for at, one in found.items() if blobs.has(one.outcome["model"])]
    if number not in kept:
        raise ConfigError(
            f"round {number} of job {job} is not kept; kept are: {', '.join(map(str, kept)) or 'none'}. "
            "`edgefl cloud start --kept-models` keeps more"
        )
    outcome, optimizer = found[number].outcome, found[number].optimizer_sha256
    if optimizer is None and number == latest.rounds_done:
        optimizer = latest.optimizer_sha256  # of a cloud that did not keep those of rounds
    frozen = outcome.get("frozen")
    if frozen is not None and not blobs.has(frozen):
        raise ConfigError(f"the frozen tensors of job {job} are no longer kept; it cannot be continued")
    return KeptState(
        model=_ref(blobs, outcome["model"]), optimizer_sha256=optimizer,
        frozen=None if frozen is None else _ref(blobs, frozen),
    )  # fmt: skip


def forget_state(engine: sa.Engine, blobs: BlobStore, job: str, number: int) -> None:
    """Delete the parameters and the optimizer's state after an old round, unless a job still uses them."""
    at = (rounds.c.job == job) & (rounds.c.round == number)
    with engine.begin() as db:
        row = db.execute(rounds.select().where(at)).one_or_none()
        if row is None or row.outcome is None:
            return
        model, optimizer = row.outcome["model"], row.optimizer_sha256
        db.execute(rounds.update().where(at).values(optimizer_sha256=None))
        frozen = row.outcome.get("frozen") if _is_divided(db, job) else None  # then each round has its own
        frozen_used = _count(db, jobs.c.frozen_sha256 == frozen) + _count(
            db, (rounds.c.outcome["frozen"].as_string() == frozen) & ~at
        )
        model_used = _count(db, jobs.c.model_sha256 == model)
        optimizer_used = _count(db, jobs.c.optimizer_sha256 == optimizer) + _count(
            db, rounds.c.optimizer_sha256 == optimizer
        )
    if not model_used:
        blobs.delete(model)
    if frozen and not frozen_used:
        blobs.delete(frozen)
    if optimizer and not optimizer_used:
        blobs.delete(optimizer)


def _is_divided(db: sa.Connection, job: str) -> bool:
    return db.scalar(sa.select(jobs.c.division).where(jobs.c.id == job)) is not None


def _count(db: sa.Connection, condition: sa.ColumnElement[bool]) -> int:
    return int(db.scalar(sa.select(sa.func.count()).where(condition)) or 0)


def _ref(blobs: BlobStore, sha256: str) -> BlobRef:
    return BlobRef(sha256=sha256, size=blobs.path(sha256).stat().st_size)
