"""Jobs in the database: what was submitted, which round is open, and which devices have answered.

Each update counts exactly once because of three commits: a round's cohort before it is announced, an update before
it is acknowledged, and a round's outcome together with the new model. After a crash between them, the rows say
what to repeat.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cloud.jobs.answers import AnswerRow
from cloud.jobs.division import check_division, division_of, frozen_values
from cloud.jobs.kept_models import forget_state
from cloud.jobs.participations import keep_history
from cloud.jobs.parts import check_fragments, check_parts, frozen_of
from cloud.jobs.round_metrics import round_json, store_metrics
from cloud.state.blobs import BlobStore
from cloud.state.followers import Followers
from cloud.state.store import NEW_UPDATE, jobs, rounds, sums, updates
from edgefl.aggregation import check_rule
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.choosing.history import Participation
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError, NotFound
from edgefl.protocols.labels import check_label
from edgefl.protocols.manifest import Bundle
from edgefl.protocols.messages import BlobRef, Division, Signed, from_json
from edgefl.records import DeviceEvaluation, EvaluationSpec, RoundOutcome
from edgefl.rounds import LastEvaluation
from edgefl.stopping import make_stop
from edgefl.trees import SpooledTree

Rows = list[dict[str, Any]]

ENDED = frozenset({"done", "failed", "cancelled"})
UNFINISHED = frozenset({"running", "paused"})
MAX_NOT_CHOSEN = 1000  # devices of a round whose reasons are kept over a restart


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRow:
    """One job, as stored, for the aggregator."""

    id: str
    state: str
    bundle: Signed
    config: JobConfig
    buffers: tuple[str, ...]
    rounds_done: int
    model: BlobRef
    optimizer_sha256: str | None
    cohort: tuple[str, ...]  # of the open round, if there is one
    owed: tuple[str, ...] = ()  # devices whose answer of the last finished round still counts
    parted: bool = False  # whether `model` has only the trained tensors and the buffers
    frozen: BlobRef | None = None  # the model's other tensors
    evaluation: EvaluationSpec | None = None  # what devices evaluate; None = nothing
    division: Division | None = None  # of a job in parts


class Jobs:
    """All jobs of a home. `started` is called with the id of each job that is submitted."""

    def __init__(self, engine: sa.Engine, blobs: BlobStore, sign: Callable[[Bundle], Signed]) -> None:
        self._engine, self._blobs, self._sign = engine, blobs, sign
        self._changed, self._evaluating = threading.Condition(), threading.Lock()
        self.started: Callable[[str], None] = lambda _job: None
        self.cancelled: Callable[[str], None] = lambda _job: None
        self.followers = Followers()
        self.waiting: Callable[[], str] = lambda: ""  # what running jobs wait for, e.g. disk space
        self.queued: Callable[[str], str] = lambda _job: ""  # what one job waits for, such as devices

    def submit(  # noqa: PLR0913 - the fields of the request
        self, task: str, bundle: BlobRef, parameters: BlobRef, buffers: Sequence[str], config: JobConfig,
        key: str | None = None, *, parted: bool = False, frozen: BlobRef | None = None, name: str | None = None,
        label: str | None = None, evaluation: EvaluationSpec | None = None, division: Division | None = None,
    ) -> str:  # fmt: skip
        """Start a job and return its id; raises ConfigError if it could only fail, ProtocolError for an invalid tree.

        A request that is sent again with the same `key`, because its reply was lost, returns the same job. If the
        tensors are `parted`, `parameters` has the trained tensors and the buffers, and `frozen` all others. `name` is
        the task's, `label` the job's; both are for people.
        """
        check_label(label)
        job = f"job-{key[:16] if key else secrets.token_hex(4)}"
        if key and self._is_known(job):
            return job
        check_parts(self._blobs, bundle, parameters, frozen, buffers, division.device_frozen if division else None)
        check_fragments(self._blobs, parameters, config.server.fragments)
        check_division(config, division, SpooledTree(self._blobs.path(frozen.sha256)) if frozen else None)
        check_rule(config)
        make_stop(config.rounds.stop)
        ServerOptimizer(config.server, gradient=False)
        values = {
            "id": job,
            "task": task,
            "name": name,
            "label": label,
            "bundle": dataclasses.asdict(self._sign(Bundle(blob=bundle, task=task))),
            "config": dataclasses.asdict(config),
            "buffers": list(buffers),
            "state": "running",
            "rounds_done": 0,
            "model_sha256": parameters.sha256,
            "model_size": parameters.size,
            "created_s": time.time(),
            "parted": parted or frozen is not None,
            **frozen_values(frozen),
            "evaluation": sa.null() if evaluation is None else dataclasses.asdict(evaluation),
            "division": division and dataclasses.asdict(division),
        }
        with self._engine.begin() as db:
            db.execute(jobs.insert().values(values))
        self.started(job)
        return job

    def running(self) -> list[str]:
        """Return the ids of the running jobs."""
        return self._in_states("running")

    def unfinished(self) -> list[str]:
        """Return the ids of the running and the paused jobs."""
        return self._in_states(*UNFINISHED)

    def _in_states(self, *states: str) -> list[str]:
        with self._engine.begin() as db:
            return list(db.scalars(sa.select(jobs.c.id).where(jobs.c.state.in_(states)).order_by(jobs.c.created_s)))

    def load(self, job: str) -> JobRow:
        """Return a job's stored state."""
        with self._engine.begin() as db:
            row = db.execute(jobs.select().where(jobs.c.id == job)).mappings().one()
            open_round = (rounds.c.job == job) & rounds.c.outcome.is_(sa.null())
            cohort = db.scalar(sa.select(rounds.c.cohort).where(open_round))
        return JobRow(
            id=job,
            state=row["state"],
            bundle=from_json(Signed, row["bundle"]),
            config=from_dict(JobConfig, row["config"]),
            buffers=tuple(row["buffers"]),
            rounds_done=row["rounds_done"],
            model=BlobRef(sha256=row["model_sha256"], size=row["model_size"]),
            optimizer_sha256=row["optimizer_sha256"],
            cohort=tuple(cohort or ()),
            owed=tuple(row["owed"] or ()),
            parted=bool(row["parted"]),
            frozen=frozen_of(row),
            evaluation=None if row["evaluation"] is None else EvaluationSpec(**row["evaluation"]),
            division=division_of(row),
        )

    def has_open_round(self, job: str) -> bool:
        """Whether a round of the job was announced and is not finished."""
        open_round = (rounds.c.job == job) & rounds.c.outcome.is_(sa.null())
        with self._engine.begin() as db:
            return db.scalar(sa.select(rounds.c.round).where(open_round)) is not None

    def open_round(
        self, job: str, number: int, cohort: Sequence[str], not_chosen: Mapping[str, Sequence[str]] | None = None,
        *, with_late: bool = False,
    ) -> list[AnswerRow]:  # fmt: skip
        """Create the round's row if it is missing, and return the answers from before a restart.

        `with_late`: also the late ones, of the round before.
        `not_chosen` says of devices that are not in the cohort why (code, reason).
        """
        key = {"job": job, "round": number}
        with self._engine.begin() as db:
            here = (rounds.c.job == job) & (rounds.c.round == number)
            if db.scalar(sa.select(rounds.c.job).where(here)) is None:
                db.execute(rounds.insert().values(key | {"cohort": list(cohort), "outcome": sa.null()}))
                kept = dict(itertools.islice((not_chosen or {}).items(), MAX_NOT_CHOSEN))
                db.execute(jobs.update().where(jobs.c.id == job).values(not_chosen=kept or None))
            of_round = (updates.c.job == job) & updates.c.round.in_((number, number - 1) if with_late else (number,))
            found = db.execute(updates.select().where(of_round).order_by(sa.text("rowid"))).mappings()
            return [
                AnswerRow(
                    **{name: row[name] for name in ("device", "file", "metrics", "reason", "region", "refused")},
                    weight=row["weight"] or 0.0,
                    late=row["round"] < number,
                    evaluation=None if row["evaluation"] is None else DeviceEvaluation(**row["evaluation"]),
                )
                for row in found
            ]

    def record(self, job: str, number: int, *answers: AnswerRow) -> None:
        """Make answers durable, in one commit, before they are acknowledged."""
        with self._engine.begin() as db:
            db.execute(NEW_UPDATE, [one.of_round(job, number) for one in answers])

    def has_answers(self, job: str, number: int, files: Sequence[str]) -> bool:
        """Whether `record` has stored an answer with one of these files."""
        here = (updates.c.job == job) & (updates.c.round == number) & updates.c.file.in_(files)
        with self._engine.connect() as db:
            return db.scalar(sa.select(updates.c.file).where(here).limit(1)) is not None

    def record_sum(self, job: str, number: int, file: str, note: str, answers: Sequence[AnswerRow]) -> None:
        """Make the sum of a region durable, with the answers of all its devices; `note` is its SumNote as JSON."""
        key = {"job": job, "round": number}
        with self._engine.begin() as db:
            db.execute(sums.insert().values(key | {"file": file, "note": note}))
            db.execute(updates.insert(), [one.of_round(job, number) for one in answers])

    def sum_note(self, job: str, number: int, file: str) -> str:
        """Return what `record_sum` stored."""
        here = (sums.c.job == job) & (sums.c.round == number) & (sums.c.file == file)
        with self._engine.begin() as db:
            return str(db.scalar(sa.select(sums.c.note).where(here)))

    def has_sum(self, job: str, number: int, file: str) -> bool:
        """Whether `record_sum` has stored a sum with this file; its file alone may be from before a kill."""
        with self._engine.begin() as db:
            return db.scalar(sa.select(sums.c.file).filter_by(job=job, round=number, file=file)) is not None

    def withdraw_sums(self, job: str, number: int, devices: Collection[str]) -> list[str]:
        """Delete accepted sums that have one of these devices; return all devices of those sums, now without answer."""
        key = {"job": job, "round": number}
        with self._engine.begin() as db:
            rows = db.execute(sa.select(updates.c.device, updates.c.file, updates.c.region).filter_by(**key)).all()
            files = {file for device, file, region in rows if region and file and device in devices}
            for table in (updates, sums):
                db.execute(table.delete().filter_by(**key).where(table.c.file.in_(files)))
        return [device for device, file, _ in rows if file in files]

    def forget_round(self, job: str, number: int) -> None:
        """Delete an open round and its answers: in a region, after its parent has closed it."""
        with self._engine.begin() as db:
            for table in (updates, sums, rounds):
                db.execute(table.delete().where((table.c.job == job) & (table.c.round == number)))

    def finish_round(  # noqa: PLR0913 - what one commit writes
        self, outcome: RoundOutcome, model: BlobRef, optimizer_sha256: str | None, kept_rounds: int = 0,
        learnt: Mapping[str, Participation] | None = None, owed: Sequence[str] = (), *, frozen: BlobRef | None = None,
    ) -> None:  # fmt: skip
        """Close a round: store its outcome and the model, and delete its answers, in one commit.

        Also deletes older rounds, except the latest `kept_rounds` and those that a follower has not read; 0 keeps all.
        `learnt` is what the round has changed in the job's history; `owed` are devices whose answer still counts.
        """
        pruned = self.followers.prunable(outcome.job, outcome.round, kept_rounds) if kept_rounds else 0
        shown = outcome.report().as_json() | {"model": model.sha256}
        values = {
            "rounds_done": outcome.round, "model_sha256": model.sha256, "model_size": model.size,
            "optimizer_sha256": optimizer_sha256, "owed": list(owed) or None, **frozen_values(frozen),
        }  # fmt: skip
        in_job = outcome.job
        with self._engine.begin() as db:
            if kept := db.scalar(sa.select(jobs.c.frozen_sha256).where(jobs.c.id == in_job)):
                shown |= {"frozen": frozen.sha256 if frozen is not None else kept}  # the other tensors of this model
            at = (rounds.c.job == in_job) & (rounds.c.round == outcome.round)
            db.execute(rounds.update().where(at).values(outcome=shown, optimizer_sha256=optimizer_sha256))
            keep_history(db, in_job, learnt or {})
            db.execute(updates.delete().where(updates.c.job == in_job))
            db.execute(sums.delete().where(sums.c.job == in_job))
            if pruned:
                db.execute(rounds.delete().where((rounds.c.job == in_job) & (rounds.c.round <= pruned)))
            db.execute(jobs.update().where(jobs.c.id == in_job).values(values))
        self._notify()

    def end(
        self, job: str, state: str, error: str | None = None, model: BlobRef | None = None,
        last: LastEvaluation | None = None, stopped: str = "",
    ) -> None:  # fmt: skip
        """Mark a job as done, failed or cancelled. `stopped` says why it was done before its last round.

        `model` is the last one with all tensors, if the job was parted; `last` its evaluation by devices, whose own
        answers are deleted in the same commit.
        """
        values: dict[str, Any] = {"state": state, "error": error, "ended_s": time.time(), "stopped": stopped or None}
        if model is not None:
            values |= {"model_sha256": model.sha256, "model_size": model.size, "frozen_sha256": None}
        if last is not None:
            values["last_evaluation"] = last.as_json()
        with self._engine.begin() as db:
            running = (jobs.c.id == job) & jobs.c.state.in_(UNFINISHED)
            db.execute(jobs.update().where(running).values(values))
            if last is not None:
                db.execute(updates.delete().where(updates.c.job == job))
                db.execute(sums.delete().where(sums.c.job == job))
                db.execute(rounds.delete().where((rounds.c.job == job) & rounds.c.outcome.is_(sa.null())))
        self.followers.forget(job)
        self._notify()

    def list(self) -> Rows:
        """Return every job as the REST plane shows it, the newest first, with the metrics of its last round."""
        last = (rounds.c.job == jobs.c.id) & (rounds.c.round == jobs.c.rounds_done)
        found = sa.select(jobs, rounds.c.outcome, rounds.c.evaluated).join_from(jobs, rounds, last, isouter=True)
        with self._engine.begin() as db:
            return [
                self._shown(row) | {"metrics": round_json(row)["metrics"] if row["outcome"] else {}}
                for row in db.execute(found.order_by(jobs.c.created_s.desc())).mappings()
            ]

    def get(self, job: str) -> dict[str, Any]:
        """Return one job with the rounds that are kept; raises NotFound for an unknown id."""
        return self.row(job) | {"rounds": self.rounds_after(job, 0)}

    def row(self, job: str) -> dict[str, Any]:
        """Return one job without its rounds; raises NotFound for an unknown id."""
        with self._engine.begin() as db:
            row = db.execute(jobs.select().where(jobs.c.id == job)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no job {job!r}; list them with `edgefl jobs list`")
        return self._shown(row)

    def follow(self, job: str, after: int) -> AbstractContextManager[Callable[[int], None]]:
        """Follow a job's rounds above `after`; a round is kept until the reader confirms it."""
        return self.followers.reading(job, after)

    def rounds_after(self, job: str, number: int, limit: int | None = None) -> Rows:
        """Return the outcomes of the finished rounds above `number`, with what was evaluated; at most `limit`."""
        later = (rounds.c.job == job) & (rounds.c.round > number) & rounds.c.outcome.is_not(sa.null())
        columns = sa.select(rounds.c.outcome, rounds.c.evaluated)
        with self._engine.begin() as db:
            found = db.execute(columns.where(later).order_by(rounds.c.round).limit(limit)).mappings()
            return [round_json(row) for row in found]

    def keep_metrics(self, job: str, number: int, metrics: Mapping[str, float | None]) -> bool:
        """Store metrics of the model after a finished round, beside those that the round itself has.

        Called again, the last value of a name is kept; None = not a finite number. Returns False for a round that is
        no longer kept. Raises NotFound for an unknown job, ConfigError for a round that is not finished, and for more
        than MAX_EVALUATED names.
        """
        done = int(self.row(job)["rounds_done"])
        if not 1 <= number <= done:
            raise ConfigError(f"job {job} has finished {done} rounds; round {number} has no model to evaluate yet")
        with self._evaluating:
            return store_metrics(self._engine, job, number, metrics)

    def wait(self, job: str, rounds_seen: int, timeout_s: float) -> bool:
        """Wait until a round after `rounds_seen` is finished or the job has ended; False at the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: self._has_news(job, rounds_seen), timeout_s)

    def cancel(self, job: str) -> None:
        """Stop a running job; do nothing if it has ended. Raises NotFound for an unknown id.

        The job's thread is interrupted before the row is changed, so that it stops even while the disk is full.
        """
        if self.row(job)["state"] in UNFINISHED:
            self.cancelled(job)
            self.end(job, "cancelled", "cancelled by its operator")

    def forget_model_of(self, job: str, number: int) -> None:
        """Delete the parameters and the optimizer's state after an old round, unless a job still uses them."""
        forget_state(self._engine, self._blobs, job, number)

    def _is_known(self, job: str) -> bool:
        with self._engine.begin() as db:
            return db.scalar(sa.select(jobs.c.id).where(jobs.c.id == job)) is not None

    def _has_news(self, job: str, rounds_seen: int) -> bool:
        with self._engine.begin() as db:
            state, rounds_done = db.execute(sa.select(jobs.c.state, jobs.c.rounds_done).where(jobs.c.id == job)).one()
        return state in ENDED or rounds_done > rounds_seen

    def _shown(self, row: Any) -> dict[str, Any]:
        names = ("id", "task", "state", "rounds_done", "config", "error", "created_s", "ended_s", "label", "stopped")
        frozen = frozen_of(row)
        return {"kind": "train", **{name: row[name] for name in names}} | {
            "name": row["name"] or row["task"],
            "continues": row["continues"],
            "waiting": self._waits_for(row["id"], row["state"]) or None,
            "model": {"sha256": row["model_sha256"], "size": row["model_size"]},
            "last_evaluation": row["last_evaluation"],
            "frozen": None if frozen is None else dataclasses.asdict(frozen),
        }

    def _waits_for(self, job: str, state: str) -> str:
        if state == "paused":
            return f"waiting for `edgefl jobs resume {job}`"
        return self.waiting() or self.queued(job) if state == "running" else ""

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
