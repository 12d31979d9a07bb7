"""What an operator does with jobs beside starting and cancelling them: pause, resume, continue from a kept round.

A paused job finishes its open round first; then it keeps its place, its model and its rounds, over restarts, too.
A continuation is a new job: it starts with the parameters and the optimizer's state after a round of another job, and
its rounds are numbered on, so that schedules and seeds are those of a job that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

from cloud.jobs.choice import OFFLINE, ChoiceBoard, Reason
from cloud.jobs.kept_models import kept_state
from cloud.state.blobs import BlobStore
from cloud.state.jobs import UNFINISHED, Jobs
from cloud.state.store import jobs, rounds
from edgefl.config import JobConfig
from edgefl.errors import ConfigError, NotFound
from edgefl.protocols.labels import check_label
from edgefl.protocols.manifest import Bundle
from edgefl.protocols.messages import BlobRef, Signed

CHOSEN = "chosen"
_SHARED = ("server", "aggregation")  # sections that a continuation has in common with its job


class JobControl:
    """Operations on the jobs of a home. Methods may be called from any thread."""

    def __init__(
        self, engine: sa.Engine, all_jobs: Jobs, blobs: BlobStore, sign: Callable[[Bundle], Signed], board: ChoiceBoard
    ) -> None:
        self._engine, self._jobs, self._blobs, self._sign, self._board = engine, all_jobs, blobs, sign, board
        self.paused: Callable[[str], None] = lambda _job: None  # called with each job that is paused
        self.resumed: Callable[[str], None] = lambda _job: None

    def priority(self, job: str) -> int:
        """Return a job's priority, also if its other settings cannot be used."""
        return int(self._row(job)["config"].get("rounds", {}).get("priority", 0))

    def pause(self, job: str) -> str:
        """Pause a running job after its open round; return its state. Raises NotFound, and ConfigError if it ended."""
        if self._change(job, "running", "paused"):
            self.paused(job)
        return self._unfinished(job, "pause")

    def resume(self, job: str) -> str:
        """Let a paused job continue; return its state. Raises NotFound, and ConfigError if it has ended."""
        if self._change(job, "paused", "running"):
            self.resumed(job)
        return self._unfinished(job, "resume")

    def continued(  # noqa: PLR0913 - the fields of the request
        self, job: str, number: int | None, config: JobConfig, *, key: str | None = None, label: str | None = None,
        bundle: BlobRef | None = None, task: str | None = None,
    ) -> str:  # fmt: skip
        """Start a job from a kept round of another; return its id. `bundle` and `task` replace its code.

        Raises ConfigError for a round that is not kept, and for settings that do not fit its state.
        """
        check_label(label)
        new = f"job-{key[:16] if key else secrets.token_hex(4)}"
        with self._engine.begin() as db:
            if db.scalar(sa.select(jobs.c.id).where(jobs.c.id == new)) is not None:
                return new  # the request was sent again
        was = self._row(job)
        number = int(was["rounds_done"]) if number is None else number
        state = kept_state(self._engine, self._blobs, job, number)
        frozen = state.frozen
        self._refuse_unfit(job, number, was["config"], config)
        values = {name: was[name] for name in ("buffers", "evaluation", "name", "task", "bundle", "parted", "division")}
        if bundle is not None and task is not None:
            if not self._blobs.has(bundle.sha256):
                raise ConfigError(f"the job's bundle {bundle.sha256[:16]}... is not in the cloud; upload it first")
            values |= {"task": task, "bundle": dataclasses.asdict(self._sign(Bundle(blob=bundle, task=task)))}
        values["evaluation"] = sa.null() if values["evaluation"] is None else values["evaluation"]
        values |= {
            "id": new, "label": label, "config": dataclasses.asdict(config), "state": "running", "rounds_done": number,
            "model_sha256": state.model.sha256, "model_size": state.model.size,
            "optimizer_sha256": state.optimizer_sha256,
            "created_s": time.time(), "frozen_sha256": None if frozen is None else frozen.sha256,
            "frozen_size": None if frozen is None else frozen.size, "continues": f"{job} round {number}",
        }  # fmt: skip
        with self._engine.begin() as db:
            db.execute(jobs.insert().values(values))
        self._jobs.started(new)
        return new

    def devices(self, job: str, fleet: Mapping[str, bool]) -> list[dict[str, Any]]:
        """Return of each device whether it was chosen for the job's latest round, and if not, why.

        `fleet` says of each enrolled device whether it is online.
        """
        row = self._row(job)
        with self._engine.begin() as db:
            latest = sa.select(rounds.c.round, rounds.c.cohort).where(rounds.c.job == job)
            found = db.execute(latest.order_by(rounds.c.round.desc()).limit(1)).one_or_none()
        cohort = frozenset(found.cohort if found is not None else ())
        kept = {name: Reason(*one) for name, one in (row["not_chosen"] or {}).items()}
        reasons = self._board.reasons.get(job, kept)
        lines = []
        for name in sorted({*fleet, *cohort}):
            reason = reasons.get(name)
            if reason is None and name not in cohort:
                is_offline = not fleet.get(name, False)
                reason = Reason(OFFLINE if is_offline else "", "it is offline" if is_offline else "")
            code = CHOSEN if reason is None else reason.code
            lines.append({"device": name, "round": None if found is None else found.round, "code": code,
                          "reason": "" if reason is None else reason.text})  # fmt: skip
        return lines

    def _change(self, job: str, before: str, after: str) -> bool:
        here = (jobs.c.id == job) & (jobs.c.state == before)
        with self._engine.begin() as db:
            return db.execute(jobs.update().where(here).values(state=after)).rowcount == 1

    def _unfinished(self, job: str, verb: str) -> str:
        state = str(self._row(job)["state"])
        if state not in UNFINISHED:
            raise ConfigError(f"job {job} has ended ({state}); there is nothing to {verb}")
        return state

    def _row(self, job: str) -> Mapping[str, Any]:
        with self._engine.begin() as db:
            row = db.execute(jobs.select().where(jobs.c.id == job)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"there is no job {job!r}; list them with `edgefl jobs list`")
        return dict(row)

    def _refuse_unfit(self, job: str, number: int, was: Mapping[str, Any], config: JobConfig) -> None:
        if config.rounds.count <= number:
            raise ConfigError(
                f"rounds.count={config.rounds.count} counts all rounds, also the {number} of job {job} that it "
                f"continues; set it above {number}"
            )
        now, defaults = dataclasses.asdict(config), dataclasses.asdict(JobConfig())
        for section in _SHARED:
            before = defaults[section] | was.get(section, now[section])  # an older cloud knew fewer settings
            if before != now[section]:
                raise ConfigError(
                    f"[{section}] is {now[section]}, but job {job} has {before}; a job that continues from its "
                    "state keeps it"
                )
