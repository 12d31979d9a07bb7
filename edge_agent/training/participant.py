"""Takes part in rounds: downloads an assignment's inputs, runs the trainer, puts the update into the outbox.

One assignment at a time. A newer `Fit` of a job replaces an older one; one of each other job waits. A `Deliver` is a
message to a Flower app's ClientApp; every such message is answered.
Invariant: an assignment ends with an update or with a failure and its reason. If the cloud closed the round or could
not be reached, there is neither; in the latter case the cloud sends it again in its answer to `Next`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.link.channel import CloudChannel
from edge_agent.link.outbox import Outbox
from edge_agent.link.transfer import download
from edge_agent.policy.watch import refusal_text
from edge_agent.store import FailureNote, Outgoing, Store
from edge_agent.training import trainer_wire as wire
from edge_agent.training.bundles import Bundles, work_folder
from edge_agent.training.environments import Environments
from edge_agent.training.frozen_parts import FrozenParts
from edge_agent.training.queue_rules import goes_on_beside, is_given_up, is_over, parameters_of, queue_key
from edge_agent.training.trainer import Trainer
from edgefl.errors import CloudUnreachable, EdgeflError, HomeError, ProtocolError, TaskError, TrainerLost
from edgefl.logs import event
from edgefl.measure import give_back_memory
from edgefl.protocols.assignments import model_of
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.messages import (
    Assignment,
    BlobRef,
    Deliver,
    Evaluate,
    Fit,
    JobMessage,
    RoundClosed,
    UpdateRefused,
)
from edgefl.records import DeviceEvaluation

MAX_WAITING = 64  # assignments; the answer to `Next` lists the others again
LEAD_S, LEAD_SHARE = 2.0, 0.05  # stop this long before the deadline, so that a failure reaches the cloud in time
MAX_TRIES = 4  # for one assignment, if the system kills the trainer
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 2.0
_SHA256 = re.compile("[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParticipantDependencies:
    """The dependencies and settings of a participant."""

    device: str
    home: Path
    options: Mapping[str, str]  # for the task's data loaders
    memory_limit_mb: int  # of the trainer
    store: Store
    outbox: Outbox
    trainer: Trainer
    bundles: Bundles
    environments: Environments
    channel: CloudChannel
    rendezvous: str = ""  # HOST:PORT where the other machines of this site join; empty = there are none
    machines: int = 1  # of this site
    on_change: Callable[[], None] = lambda: None  # called when `Participant.current` changes


class Participant:
    """The rounds of one agent. Used from its event loop."""

    def __init__(self, deps: ParticipantDependencies) -> None:
        self._deps = deps
        self._waiting: dict[tuple[str, int], Assignment] = {}  # by `queue_key`
        self._newest: dict[str, int] = {}  # job -> round of its newest training
        self._current: Assignment | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._job_ended = False  # release memory as soon as no other job has work
        self._models = deps.home / "work"
        self._models.mkdir(mode=0o700, exist_ok=True)
        self._model: Path | None = None  # the file whose hash this process has checked
        self._frozen = FrozenParts(deps.home, deps.channel)
        self._refusals: Mapping[str, str] = {}  # of the device's own policy
        self._told: dict[str, str] = {}  # job -> why it was not evaluated, as logged last

    @property
    def current(self) -> Assignment | None:
        """The running assignment; None if there is none."""
        return self._current

    def handle(self, message: JobMessage) -> None:
        """Handle a message from topic down/<device>/job."""
        match message:
            case Fit() | Deliver() | Evaluate():
                if message.round >= self._newest.get(message.job, 0):  # an older round is over
                    self.offer(message)
            case RoundClosed():
                self.close(message)
            case UpdateRefused():
                event(_log, logging.WARNING, "update.refused", job=message.job, round=message.round,
                      reason=message.reason)  # fmt: skip

    def offer(self, assignment: Assignment) -> None:
        """Queue an assignment, unless it is queued, running or answered already."""
        current, waiting = self._current, self._waiting.get(queue_key(assignment))
        if self._deps.store.is_answered(assignment.job, assignment.round):
            self._deps.outbox.wake()
            return
        if self._refusals:
            self._fail(assignment, f"the device's own policy: {refusal_text(self._refusals)}")
            return
        if any(
            one and queue_key(one) == queue_key(assignment) and one.round >= assignment.round
            for one in (current, waiting)
        ):
            return
        if waiting is None and len(self._waiting) >= MAX_WAITING:
            event(_log, logging.WARNING, "plan.deferred", job=assignment.job, round=assignment.round,
                  waiting=len(self._waiting))  # fmt: skip
            return  # the answer to `Next` lists it again
        self._waiting[queue_key(assignment)] = assignment
        if assignment.replaces_older:
            self._newest[assignment.job] = assignment.round
        if current and queue_key(current) == queue_key(assignment) and not goes_on_beside(current, assignment):
            self._cancel("a newer round has started")
        self._wake.set()

    def refuse(self, refusals: Mapping[str, str]) -> None:
        """Take in what the device's own policy refuses now; all work ends at once, with its reason for the cloud."""
        self._refusals = refusals
        if not refusals:
            return
        for assignment in [*self._waiting.values(), *([self._current] if self._current is not None else [])]:
            self._fail(assignment, f"the device's own policy: {refusal_text(refusals)}")
        self._waiting.clear()
        self._cancel("the device's own policy")

    def close(self, closed: RoundClosed) -> None:
        """Stop working for a round that is over."""
        for key, waiting in list(self._waiting.items()):
            if is_over(waiting, closed):
                del self._waiting[key]
        if self._current is not None and is_over(self._current, closed):
            self._cancel("the round is over")
        self._deps.outbox.drop(closed.job, closed.round)
        if closed.job_ended:
            self._newest.pop(closed.job, None)
            self.forget([closed.job])
            self._job_ended = True
            self._wake.set()

    def reconcile(self, assignments: Sequence[Assignment], before: Assignment | None, answered_until: int) -> None:
        """Handle the answer to `Next`: the given assignments are all that are open.

        `before` and `answered_until` are the running assignment and `Store.last_answered` from before the request: if
        `before` is not open any more, it is cancelled. A round that is open although it was marked as answered by
        then is trained again: the cloud was killed before the end of that round was durable.
        """
        if before is not None and before is self._current and is_given_up(before, assignments):
            self._cancel("the cloud no longer waits for it")
        for assignment in assignments:
            try:
                self._deps.store.reopen(assignment.job, assignment.round, answered_until)
            except HomeError as error:
                event(_log, logging.ERROR, "plan.deferred", job=assignment.job, round=assignment.round, reason=error)
                continue
            self.offer(assignment)

    def jobs_with_data(self) -> list[str]:
        """Return the jobs that keep state or frozen tensors on this device."""
        return sorted({*self._deps.store.jobs_with_state(), *self._frozen.jobs()})

    def forget(self, jobs: Sequence[str]) -> None:
        """Delete the state and the frozen tensors of jobs that have ended."""
        for job in jobs:
            self._told.pop(job, None)
            try:
                self._deps.store.forget_state(job)
                self._frozen.forget(job)
            except (HomeError, OSError) as error:  # full disk: the next answer to `Next` names the job again
                event(_log, logging.ERROR, "state.not_forgotten", job=job, reason=error)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                assignment = self._waiting.pop(next(iter(self._waiting)))
                async with asyncio.TaskGroup() as tasks:
                    self._current = assignment
                    self._task = tasks.create_task(
                        self._execute(assignment), name=f"round-{assignment.job}-{assignment.round}"
                    )
                    self._deps.on_change()
                self._current = self._task = None
                self._deps.on_change()
            if self._job_ended:
                self._job_ended = False
                self._release_memory()

    def _release_memory(self) -> None:
        self._model = None
        try:
            for file in self._models.iterdir():
                file.unlink()
            self._deps.store.drop_spare()
        except OSError as error:  # disk error; the next rounds overwrite or delete what is left
            event(_log, logging.ERROR, "work.not_removed", reason=error)
        self._deps.trainer.keep_spare()
        give_back_memory()

    async def _execute(self, assignment: Assignment) -> None:
        start_s = time.monotonic()
        event(_log, logging.INFO, "plan.taken", job=assignment.job, round=assignment.round,
              deadline_s=assignment.deadline_s)  # fmt: skip
        lead_s = min(LEAD_S, LEAD_SHARE * assignment.deadline_s)
        limit_s = assignment.deadline_s - lead_s
        evaluate_until = asyncio.get_running_loop().time() + limit_s - lead_s  # an update before it is not lost
        try:
            async with asyncio.timeout(limit_s):
                update, state = await self._answer(assignment, evaluate_until)
            self._deps.outbox.put(update, state)
        except CloudUnreachable as error:
            event(_log, logging.WARNING, "plan.put_off", job=assignment.job, round=assignment.round, reason=error)
        except TimeoutError:
            self._fail(
                assignment,
                f"stopped after {limit_s:g} s, shortly before the round's deadline ({assignment.deadline_s:g} s)",
            )
        except EdgeflError as error:
            self._fail(assignment, str(error))
        except OSError as error:
            self._fail(assignment, f"an operating system error on the device: {error}")
        else:
            event(_log, logging.INFO, "update.made", job=assignment.job, round=assignment.round, bytes=update.size,
                  weight=update.weight, seconds=time.monotonic() - start_s)  # fmt: skip

    async def _answer(self, assignment: Assignment, evaluate_until: float) -> tuple[Outgoing, Path | None]:
        """Download the inputs while the trainer starts, then run the request; return the update and the new state."""
        deps, job, number = self._deps, assignment.job, assignment.round
        starting = asyncio.create_task(deps.trainer.prepare(assignment.bundle.text), name="trainer-start")
        try:
            request = await self._fetched(assignment)
            with suppress(TrainerLost):  # `_run_with_retries` starts it again
                await starting
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)  # its error was raised above
        draft, state = deps.store.draft(job, number), deps.store.state_draft(job, number)
        try:
            request = dataclasses.replace(request, out=str(draft))
            done = await self._run_with_retries(assignment, request, evaluate_until)
            _refuse_too_large(done.size, assignment)
        except BaseException:
            deps.store.discard(draft)
            state.unlink(missing_ok=True)
            raise
        update = Outgoing(
            job=job, round=number, path=draft, size=done.size, blake3=done.blake3, weight=done.weight,
            metrics=done.metrics, evaluation=done.evaluation,
            model=model_of(assignment),
        )  # fmt: skip
        self._tell_fault(job, done.evaluation)
        return update, state if done.changed else None

    async def _fetched(self, assignment: Assignment) -> wire.Request:
        """Download what an assignment names; return the trainer's request for it, with paths in place of hashes."""
        bundle, task = await self._deps.bundles.get(assignment.bundle)
        match assignment:
            case Fit():
                return await self._fit_request(assignment, bundle, task)
            case Evaluate():
                return await self._evaluate_request(assignment, bundle, task)
            case Deliver():
                return await self._deliver_request(assignment, bundle, task)

    async def _fit_request(self, assignment: Fit, bundle: Path, task: str) -> wire.FitRequest:
        common, store = await self._task_fields(assignment, bundle, task), self._deps.store
        store.require_space(assignment.model.size)  # an update is about as large as the model; fail now
        return wire.FitRequest(
            job=assignment.job,
            round=assignment.round,
            train=assignment.train,
            evaluate=assignment.evaluate,
            rendezvous=self._deps.rendezvous,
            machines=self._deps.machines,
            deadline_s=assignment.deadline_s,
            **(store.state_files(assignment.job, assignment.round) if assignment.keeps_state else {}),
            **common,
        )

    async def _evaluate_request(self, assignment: Evaluate, bundle: Path, task: str) -> wire.EvaluateRequest:
        common = await self._task_fields(assignment, bundle, task)
        return wire.EvaluateRequest(seed=assignment.seed, workers=assignment.workers, **common)

    async def _task_fields(self, assignment: Fit | Evaluate, bundle: Path, task: str) -> dict[str, Any]:
        """Download what training and evaluation need; return the fields of `trainer_wire.TaskRequest`."""
        deps = self._deps
        packages = await deps.environments.get(bundle)  # before the model is downloaded
        frozen = await self._frozen.get(assignment.job, assignment.frozen) if assignment.frozen is not None else None
        return {
            "client": deps.device,
            "model": str(await self._fetch(*parameters_of(assignment, deps.store.has_state))),
            "frozen": str(frozen or ""),
            "parted": assignment.parted,
            "bundle": str(bundle),
            "task": task,
            "options": deps.options,
            "out": "",  # see `_answer`
            "memory_limit_mb": deps.memory_limit_mb,
            "folder": str(work_folder(deps.home, bundle)),
            "packages": packages,
        }

    def _tell_fault(self, job: str, evaluation: DeviceEvaluation | None) -> None:
        """Log why there is no evaluation, once for a job and a reason."""
        if evaluation is not None and evaluation.fault and self._told.get(job) != evaluation.fault:
            self._told[job] = evaluation.fault
            event(_log, logging.WARNING, "evaluation.failed", job=job, reason=evaluation.fault)

    async def _deliver_request(self, assignment: Deliver, bundle: Path, app: str) -> wire.DeliverRequest:
        deps = self._deps
        content = await self._fetch(assignment.content, assignment.content_blake3)
        return wire.DeliverRequest(
            app=app,
            order=str(content),
            envelope=assignment.envelope,
            bundle=str(bundle),
            options=deps.options,
            state=str(deps.store.state(assignment.job) or ""),
            state_out=str(deps.store.state_draft(assignment.job, assignment.round)),
            out="",  # see `_answer`
            memory_limit_mb=deps.memory_limit_mb,
            folder=str(work_folder(deps.home, bundle)),
        )

    async def _run_with_retries(
        self, assignment: Assignment, request: wire.Request, evaluate_until: float
    ) -> wire.WorkDone:
        """Run a request in the trainer; if the system kills the trainer, try again, at most MAX_TRIES times."""
        pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        for tries in range(1, MAX_TRIES):
            try:
                return await self._deps.trainer.run_request(request, evaluate_until)
            except TrainerLost as error:
                event(_log, logging.WARNING, "trainer.lost", job=assignment.job, round=assignment.round, tries=tries,
                      reason=error)  # fmt: skip
            await asyncio.sleep(pauses.next_s())  # until the machine has free memory again
        return await self._deps.trainer.run_request(request, evaluate_until)

    async def _fetch(self, ref: BlobRef, blake3: str) -> Path:
        """Return the file of the parameters or a message's content; that of an earlier round is overwritten."""
        if _SHA256.fullmatch(ref.sha256) is None:
            raise ProtocolError(f"the cloud names a blob {ref.sha256[:80]!r}; expected a SHA-256 in hex")
        path = self._models / ref.sha256
        if path == self._model:
            return path
        self._model = None
        part = path.with_name(f"{path.name}.part")
        if path.exists():
            path.replace(part)  # from an earlier process: `download` checks it
        others = [file for file in self._models.iterdir() if file != part]
        for file in others[1:]:
            file.unlink()
        await download(self._deps.channel, ref, path, fast_hash=blake3, reuse=others[0] if others else None)
        self._model = path
        return path

    def _fail(self, assignment: Assignment, reason: str) -> None:
        event(_log, logging.WARNING, "round.failed", job=assignment.job, round=assignment.round, reason=reason)
        try:
            self._deps.outbox.put_failure(
                FailureNote(job=assignment.job, round=assignment.round, reason=reason, model=model_of(assignment))
            )
        except HomeError as error:  # full disk: serving continues, and `Next` brings the assignment back
            event(_log, logging.ERROR, "round.not_noted", job=assignment.job, round=assignment.round, reason=error)

    def _cancel(self, reason: str) -> None:
        if self._task is not None and self._current is not None:
            event(_log, logging.INFO, "round.cancelled", job=self._current.job, round=self._current.round,
                  reason=reason)  # fmt: skip
            self._task.cancel()


def _refuse_too_large(size: int, assignment: Assignment) -> None:
    if size > assignment.max_update_bytes:
        raise TaskError(f"the update has {size} bytes; this round accepts at most {assignment.max_update_bytes}")
