"""Takes part in rounds: from a plan, over the bundle, the model and the trainer, to an update in the outbox.

One round at a time. A newer plan replaces an older one of its job; plans of other jobs wait, one each. A plan
with an envelope is a message of a relayed Flower app, answered by its ClientApp: of those, each is answered.
Invariant: a plan ends as an update, as a failure with its reason, or, where the cloud closed the round
or could not be reached, as nothing; in the last case `Next` brings it back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.link.channel import CloudChannel
from edge_agent.link.outbox import Outbox
from edge_agent.link.transfer import download
from edge_agent.store import FailureNote, Outgoing, Store
from edge_agent.training import trainer_wire as wire
from edge_agent.training.bundles import Bundles, work_folder
from edge_agent.training.frozen_parts import FrozenParts
from edge_agent.training.trainer import Trainer
from edgefl.errors import CloudUnreachable, EdgeflError, HomeError, ProtocolError, TaskError, TrainerLost
from edgefl.logs import event
from edgefl.measure import give_back_memory
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.messages import BlobRef, RoundClosed, UpdateRefused, WirePlan

MAX_WAITING = 64  # plans; `Next` lists the others again
LEAD_S, LEAD_SHARE = 2.0, 0.05  # a fit ends so long before the deadline, so that its failure is still heard
MAX_TRIES = 4  # of a fit whose trainer the machine kills
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 2.0
_SHA256 = re.compile("[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What a participant works with."""

    device: str
    home: Path
    options: Mapping[str, str]  # of the task's loaders
    memory_limit_mb: int  # of the trainer
    store: Store
    outbox: Outbox
    trainer: Trainer
    bundles: Bundles
    channel: CloudChannel


class Participant:
    """The rounds of one agent. Used from its event loop."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._waiting: dict[tuple[str, int], WirePlan] = {}  # by `_place`
        self._newest: dict[str, int] = {}  # job -> round of its last plan of training
        self._current: WirePlan | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._rest = False  # a job has ended: when no other is at work, be small again
        self._models = means.home / "work"
        self._models.mkdir(mode=0o700, exist_ok=True)
        self._model: Path | None = None  # whose bytes this process has checked
        self._frozen = FrozenParts(means.home, means.channel)

    @property
    def current(self) -> WirePlan | None:
        """The plan at work."""
        return self._current

    def hear(self, message: WirePlan | RoundClosed | UpdateRefused) -> None:
        """Act on a message of down/<device>/job."""
        match message:
            case WirePlan():
                if message.round >= self._newest.get(message.job, 0):  # else it comes late, and is over
                    self.offer(message)
            case RoundClosed():
                self.close(message)
            case UpdateRefused():
                event(_log, logging.WARNING, "update.refused", job=message.job, round=message.round,
                      reason=message.reason)  # fmt: skip

    def offer(self, plan: WirePlan) -> None:
        """Take a plan, unless it is known."""
        at_work, waiting = self._current, self._waiting.get(_place(plan))
        if self._means.store.is_answered(plan.job, plan.round):
            self._means.outbox.wake()
            return
        if any(one and _place(one) == _place(plan) and one.round >= plan.round for one in (at_work, waiting)):
            return
        if waiting is None and len(self._waiting) >= MAX_WAITING:
            event(_log, logging.WARNING, "plan.deferred", job=plan.job, round=plan.round, waiting=len(self._waiting))
            return  # `Next` lists it again
        self._waiting[_place(plan)] = plan
        if not plan.envelope:
            self._newest[plan.job] = plan.round
        if at_work and _place(at_work) == _place(plan):
            self._cancel("a newer round began")
        self._wake.set()

    def close(self, closed: RoundClosed) -> None:
        """Stop work for a round that is over."""
        for place, waiting in list(self._waiting.items()):
            if _is_over(waiting, closed):
                del self._waiting[place]
        if self._current is not None and _is_over(self._current, closed):
            self._cancel("the round is over")
        self._means.outbox.drop(closed.job, closed.round)
        if closed.job_ended:
            self._newest.pop(closed.job, None)
            self.forget([closed.job])
            self._rest = True
            self._wake.set()

    def reconcile(self, plans: Sequence[WirePlan], before: WirePlan | None, settled_until: int) -> None:
        """Act on `Next`: its plans are open, and what was at work before it was asked must be among them.

        An open round that had been settled by then was told to be over by a cloud that was killed before that
        was durable: it is done again.
        """
        still_open = {(plan.job, plan.round) for plan in plans}
        if before is not None and before is self._current and (before.job, before.round) not in still_open:
            self._cancel("the cloud no longer waits for it")
        for plan in plans:
            try:
                self._means.store.ask_again(plan.job, plan.round, settled_until)
            except HomeError as error:
                event(_log, logging.ERROR, "plan.deferred", job=plan.job, round=plan.round, reason=error)
                continue
            self.offer(plan)

    def holding(self) -> list[str]:
        """Return the jobs of which something is kept here."""
        return sorted({*self._means.store.jobs_with_state(), *self._frozen.jobs()})

    def forget(self, jobs: Sequence[str]) -> None:
        """These jobs are over: what their ClientApps kept here, and what was frozen in them, is of no use."""
        for job in jobs:
            try:
                self._means.store.forget_state(job)
                self._frozen.forget(job)
            except (HomeError, OSError) as error:  # the disk is full: `Next` says it again
                event(_log, logging.ERROR, "state.not_forgotten", job=job, reason=error)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                plan = self._waiting.pop(next(iter(self._waiting)))
                async with asyncio.TaskGroup() as tasks:
                    self._current = plan
                    self._task = tasks.create_task(self._take_part(plan), name=f"round-{plan.job}-{plan.round}")
                self._current = self._task = None
            if self._rest:
                self._rest = False
                await self._be_small()

    async def _be_small(self) -> None:
        self._model = None
        try:
            for file in self._models.iterdir():
                file.unlink()
            self._means.store.drop_spare()
        except OSError as error:  # of the disk; what is left is overwritten or removed by the next rounds
            event(_log, logging.ERROR, "work.not_removed", reason=error)
        await self._means.trainer.end()
        give_back_memory()

    async def _take_part(self, plan: WirePlan) -> None:
        start_s = time.monotonic()
        event(_log, logging.INFO, "plan.taken", job=plan.job, round=plan.round, deadline_s=plan.deadline_s)
        limit_s = plan.deadline_s - min(LEAD_S, LEAD_SHARE * plan.deadline_s)
        try:
            async with asyncio.timeout(limit_s):
                update, state = await self._answer(plan)
            self._means.outbox.put(update, state)
        except CloudUnreachable as error:
            event(_log, logging.WARNING, "plan.put_off", job=plan.job, round=plan.round, reason=error)
        except TimeoutError:
            self._fail(plan, f"no update within {limit_s:g} s of the round's {plan.deadline_s:g} s: it was stopped")
        except EdgeflError as error:
            self._fail(plan, str(error))
        except OSError as error:
            self._fail(plan, f"the device could not do it: {error}")
        else:
            event(_log, logging.INFO, "update.made", job=plan.job, round=plan.round, bytes=update.size,
                  weight=update.weight, seconds=time.monotonic() - start_s)  # fmt: skip

    async def _answer(self, plan: WirePlan) -> tuple[Outgoing, Path | None]:
        """Fetch what the plan needs while the trainer starts, then have it train; return the new state as well."""
        means = self._means
        starting = asyncio.create_task(means.trainer.prepare(), name="trainer-start")
        try:
            bundle, task = await means.bundles.get(plan.bundle)
            frozen = await self._frozen.get(plan.job, plan.frozen) if plan.frozen is not None else None
            model = await self._fetch_model(plan.model, plan.model_blake3)
            if not plan.envelope:  # an update has the model's tensors; better now than after the training
                means.store.require_space(plan.model.size)
            with suppress(TrainerLost):  # the fit tries it again
                await starting
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)  # its error was raised above, or is not the first
        draft, state = means.store.draft(plan.job, plan.round), means.store.state_draft(plan.job, plan.round)
        make = self._as_errand if plan.envelope else self._as_fit
        asked = make(plan, model, bundle, task, draft)
        if isinstance(asked, wire.Fit):
            asked = dataclasses.replace(asked, frozen=str(frozen or ""), parted=plan.parted)
        try:
            done = await self._insist(plan, asked)
            _refuse_too_large(done.size, plan)
        except BaseException:
            means.store.discard(draft)
            state.unlink(missing_ok=True)
            raise
        update = Outgoing(
            job=plan.job,
            round=plan.round,
            path=draft,
            size=done.size,
            blake3=done.blake3,
            weight=done.weight,
            metrics=done.metrics,
        )
        return update, state if done.changed else None

    async def _insist(self, plan: WirePlan, fit: wire.Fit | wire.Errand) -> wire.Done:
        """Have it done, again where the machine killed the trainer: some times, as the deadline allows."""
        pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        for tries in range(1, MAX_TRIES):
            try:
                return await self._means.trainer.fit(fit)
            except TrainerLost as error:
                event(_log, logging.WARNING, "trainer.lost", job=plan.job, round=plan.round, tries=tries, reason=error)
            await asyncio.sleep(pauses.next_s())  # for the machine to have room again
        return await self._means.trainer.fit(fit)

    def _as_errand(self, plan: WirePlan, order: Path, bundle: Path, app: str, draft: Path) -> wire.Errand:
        store = self._means.store
        return wire.Errand(
            app=app,
            order=str(order),
            envelope=plan.envelope,
            bundle=str(bundle),
            options=self._means.options,
            state=str(store.state(plan.job) or ""),
            state_out=str(store.state_draft(plan.job, plan.round)),
            out=str(draft),
            memory_limit_mb=self._means.memory_limit_mb,
            folder=str(work_folder(self._means.home, bundle)),
        )

    def _as_fit(self, plan: WirePlan, model: Path, bundle: Path, task: str, draft: Path) -> wire.Fit:
        return wire.Fit(
            job=plan.job,
            round=plan.round,
            client=self._means.device,
            train=plan.train,
            model=str(model),
            bundle=str(bundle),
            task=task,
            options=self._means.options,
            out=str(draft),
            memory_limit_mb=self._means.memory_limit_mb,
            folder=str(work_folder(self._means.home, bundle)),
        )

    async def _fetch_model(self, ref: BlobRef, blake3: str) -> Path:
        """Return the round's parameters; a file of an earlier round is overwritten."""
        if _SHA256.fullmatch(ref.sha256) is None:
            raise ProtocolError(f"the plan's model {ref.sha256[:80]!r} is not named by a SHA-256")
        path = self._models / ref.sha256
        if path == self._model:
            return path
        self._model = None
        part = path.with_name(f"{path.name}.part")
        if path.exists():
            path.replace(part)  # of an earlier process: `download` checks it
        others = [file for file in self._models.iterdir() if file != part]
        for file in others[1:]:
            file.unlink()
        await download(self._means.channel, ref, path, fast_hash=blake3, reuse=others[0] if others else None)
        self._model = path
        return path

    def _fail(self, plan: WirePlan, reason: str) -> None:
        event(_log, logging.WARNING, "round.failed", job=plan.job, round=plan.round, reason=reason)
        try:
            self._means.outbox.put_failure(FailureNote(job=plan.job, round=plan.round, reason=reason))
        except HomeError as error:  # the disk is full: predictions go on, and `Next` brings the plan back
            event(_log, logging.ERROR, "round.not_noted", job=plan.job, round=plan.round, reason=error)

    def _cancel(self, reason: str) -> None:
        if self._task is not None and self._current is not None:
            event(_log, logging.INFO, "round.cancelled", job=self._current.job, round=self._current.round,
                  reason=reason)  # fmt: skip
            self._task.cancel()


def _place(plan: WirePlan) -> tuple[str, int]:
    """Return what a plan waits under: one for a job's rounds of training, one for each message."""
    return plan.job, plan.round if plan.envelope else 0


def _is_over(plan: WirePlan, closed: RoundClosed) -> bool:
    if plan.job != closed.job:
        return False
    return closed.job_ended or plan.round == closed.round or (not plan.envelope and plan.round < closed.round)


def _refuse_too_large(size: int, plan: WirePlan) -> None:
    if size > plan.max_update_bytes:
        raise TaskError(f"the update has {size} bytes; at most {plan.max_update_bytes} are taken in this round")
