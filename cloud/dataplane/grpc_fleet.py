"""The deployed fleet: plans are announced over MQTT, models and updates go over gRPC (see `FleetService`).

The exchange (`edgefl.exchange`) decides which devices are waited for; the job's thread executes its instructions.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cloud.broker.link import DeviceLink
from cloud.dataplane.open_round import OpenRound, Presence, Surroundings
from cloud.dataplane.open_rounds import OpenRounds
from cloud.jobs.answers import AnswerRow
from cloud.jobs.choice import ChoiceBoard, DeviceChoice
from cloud.jobs.device_shares import DeviceShares
from cloud.jobs.division import on_devices
from cloud.jobs.reach import unreachable
from cloud.region.sums import partial_of
from cloud.split.fold import folded
from cloud.split.results import SplitFolder
from cloud.state.blobs import BlobStore
from cloud.state.jobs import JobRow, Jobs
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from edgefl.aggregation import rule_kind
from edgefl.choosing.combined import LATE_NEXT
from edgefl.choosing.history import History
from edgefl.config import GRACE_AUTO
from edgefl.errors import JobPaused
from edgefl.exchange import Announce, Close, Durations, GiveUp, Instruction, Terms, Yield
from edgefl.logs import event
from edgefl.protocols import tiers
from edgefl.protocols.assignments import UPDATE_AGENT
from edgefl.protocols.messages import BlobRef, Evaluate, Fit, RoundClosed, UpdateRefused
from edgefl.protocols.tiers import SumNote
from edgefl.records import Answer, Evaluated, Failure, Partial, Plan, RoundOutcome, Traffic, Update
from edgefl.rounds import NO_EVALUATION
from edgefl.trees import EncodedTree, SpooledTree, Tree, encoded_bytes, in_form, whole_bytes
from edgefl.trees.fragments import changed_part, sent_part
from edgefl.trees.views import joined

HEADER_SLACK_BYTES = 64 << 10  # another safetensors writer may make a longer header than ours

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FleetDependencies:
    """The dependencies of a job's fleet."""

    rounds: OpenRounds
    jobs: Jobs
    blobs: BlobStore
    spool: Spool
    link: DeviceLink
    storage: Storage = field(default_factory=Storage)
    clock: Callable[[], float] = time.monotonic
    shares: DeviceShares = field(default_factory=DeviceShares)
    board: ChoiceBoard = field(default_factory=ChoiceBoard)


class GrpcFleet:
    """The fleet of one job, for `run_rounds`. Used in the job's thread only."""

    def __init__(self, job: JobRow, deps: FleetDependencies, history: History | None = None) -> None:
        self._job = job
        self._deps = deps
        self._choice = DeviceChoice(job.id, job.config.rounds, deps.link, deps.shares, deps.board, history)
        self._choice.unreachable = lambda device: unreachable(job.config, deps.link.via(device))
        self._choice.next_round = job.rounds_done + 1
        self._took_part: set[str] = set()
        self._durations = Durations()
        self._refused: set[str] = set()  # devices whose answer the guard has refused since it was yielded
        self.frozen = job.frozen  # all tensors that devices do not send
        self._model_sha256: str | None = None  # hash of the open round's model
        self._temporary: list[BlobRef] = []  # of the open round, made for it alone
        if job.owed:
            deps.rounds.hold(job.id, job.rounds_done, job.owed)

    def clients(self) -> Sequence[str]:
        """Wait until enough devices can work for the job and are free, and return them.

        The first round waits up to `rounds.wait_s` for devices; later ones wait only `rounds.offline_grace_s` if the
        quorum is there. Raises the error that interrupted the job, and JobPaused.
        """
        rounds, job = self._deps.rounds, self._job.id
        found = self._choice.wait(lambda: rounds.is_halted(job), is_first=not self._took_part)
        rounds.refuse_stopped(job)
        if rounds.is_halted(job):
            raise JobPaused(f"job {job} is paused; `edgefl jobs resume {job}` continues it")
        return found

    def keep(self, parameters: Tree) -> SpooledTree:
        """Encode the parameters once for all devices; return the file's tree, which is mapped when needed.

        Raises BlobDamaged if the file of the round's model, from which they were computed, has changed.
        """
        if self._model_sha256 is not None:
            self._deps.blobs.check(self._model_sha256)
        ref = self.insist(lambda: self._deps.blobs.put_tree(parameters), encoded_bytes(parameters))
        return SpooledTree(self._deps.blobs.path(ref.sha256))

    def assembled(self, parameters: Tree) -> BlobRef | None:
        """Return the blob of a job's last model with its frozen tensors; None if it has none."""
        if self.frozen is None:
            return None
        frozen = SpooledTree(self._deps.blobs.path(self.frozen.sha256))
        tensors = joined(frozen, parameters)
        return self.insist(lambda: self._deps.blobs.put_tree(tensors), encoded_bytes(tensors))

    def fold_cloud_parts(self, outcome: RoundOutcome) -> BlobRef | None:
        """Return the blob of the tensors that devices do not send after a round; None if they are the same.

        Raises StepFailed if no device of the round has trained the cloud's part of a job in parts.
        """
        job, blobs = self._job, self._deps.blobs
        if job.division is None or self.frozen is None:
            return None
        folder = SplitFolder(blobs.folder.parent, job.id)
        before = SpooledTree(blobs.path(self.frozen.sha256))
        new = folded(folder, job.config, job.division, before, outcome)
        self.frozen = self.insist(lambda: blobs.put_tree(new), encoded_bytes(new))
        return self.frozen

    def insist(self, call: Callable[[], _T], num_bytes: int = 0) -> _T:
        """Call a function that writes; retry while the disk is full. Raises the error that interrupted the job."""
        return self._deps.storage.insist(call, lambda: self._deps.rounds.refuse_stopped(self._job.id), num_bytes)

    def published(self, parameters: Tree) -> BlobRef:
        """Return the blob of a round's parameters; store them unless `keep` has."""
        kept = parameters if isinstance(parameters, SpooledTree) else self.keep(parameters)
        return BlobRef(sha256=kept.path.name, size=kept.path.stat().st_size)

    def collect(self, plan: Plan) -> Iterator[Answer]:
        """Announce the plan and yield the answers as they arrive; first those from before a restart."""
        opened = self._open(plan)
        sums: set[str] = set()
        try:
            while not isinstance(instruction := opened.next(self._presence), Close):
                if isinstance(instruction, Yield):
                    if instruction.is_late:
                        late = opened.take(instruction.device, is_late=True)
                        if late.file is not None:  # else the device has been removed
                            yield self._as_record(late, plan)
                        self._refused.discard(instruction.device)
                        continue
                    self._choice.freed([instruction.device])
                    self._deps.link.withdraw(instruction.device, plan.job, plan.round)
                    for answer in self.records([opened.take(instruction.device)], plan, sums):
                        yield answer
                        self._settle(opened, answer)
                else:
                    self._execute(instruction, opened)
        finally:
            opened.close()
            if self._takes_late(plan):
                self._deps.rounds.hold(plan.job, plan.round, opened.missing())
            self._deps.rounds.remove(opened)
            self._close(plan)
            self._drop_temporary()
            for left in opened.given_up():
                self._execute(left, opened)
            self._tell_owed(opened)
            self._choice.freed()
            if plan.fit and self._job.config.rounds.grace == GRACE_AUTO:
                self._durations.learn(*opened.durations())

    def _takes_late(self, plan: Plan) -> bool:
        """Whether the next round takes the answers that this one lacks."""
        rounds = self._job.config.rounds
        return plan.fit and rounds.late == LATE_NEXT and plan.round < rounds.count

    def _tell_owed(self, opened: OpenRound) -> None:
        """Tell devices that their answer of the round before no longer counts."""
        assignment = opened.assignment
        if not self._deps.rounds.is_stopped(assignment.job):
            for device in opened.still_owed():
                closed = RoundClosed(job=assignment.job, round=assignment.round - 1, job_ended=False)
                self._deps.link.send_job(device, closed)

    def _sent_model(self, plan: Plan, kept: BlobRef) -> BlobRef:
        """Return the blob of the parameters in the form in which devices receive them."""
        sent = in_form(plan.parameters, self._job.config.server.wire)
        return self._for_round(sent) if isinstance(sent, EncodedTree) and sent.narrow else kept

    def _sent_fragment(self, plan: Plan) -> BlobRef | None:
        """Return the blob of what the round before has changed; None if that is the whole model."""
        if plan.train.fragments == 1 or plan.round == 1:
            return None
        return self._for_round(in_form(changed_part(plan.parameters, plan.train), self._job.config.server.wire))

    def _for_round(self, tree: Tree) -> BlobRef:
        ref = self.insist(lambda: self._deps.blobs.put_tree(tree), encoded_bytes(tree))
        self._temporary.append(ref)
        return ref

    def _drop_temporary(self) -> None:
        for ref in self._temporary:
            if not self._deps.rounds.asking_for(ref.sha256):
                self._deps.blobs.delete(ref.sha256)
        self._temporary.clear()

    def _settle(self, opened: OpenRound, answer: Answer) -> None:
        """Tell the round whether the guard has admitted an answer that was yielded."""
        if isinstance(answer, Update | Partial):
            devices = answer.contributors if isinstance(answer, Partial) else (answer.device,)
            opened.settle(devices, admitted=self._refused.isdisjoint(devices))
            self._refused.difference_update(devices)

    def records(self, answers: Iterable[AnswerRow], plan: Plan, sums: set[str] | None = None) -> Iterator[Answer]:
        """Yield the records of stored answers; `sums` has the files of sums that were yielded."""
        sums = set() if sums is None else sums
        for answer in answers:
            if answer.region is None or answer.file is None:
                yield self._as_record(answer, plan)
            elif answer.file not in sums:  # one record for all its devices
                sums.add(answer.file)
                note = tiers.unpack(SumNote, self._deps.jobs.sum_note(plan.job, plan.round, answer.file).encode())
                yield partial_of(note, SpooledTree(self._deps.spool.path(answer.file)))

    def traffic(self) -> Traffic:
        return self._deps.rounds.traffic(self._job.id)

    def refuse(self, plan: Plan, answer: Update | Partial, reason: str) -> None:
        """Log a guard's refusal and tell the device; a region's devices are told by nobody."""
        devices = answer.contributors if isinstance(answer, Partial) else (answer.device,)
        self._refused.update(devices)
        number = answer.round if isinstance(answer, Update) else plan.round
        event(_log, logging.WARNING, "update.refused", job=plan.job, round=number, device=", ".join(devices)[:500],
              reason=reason)  # fmt: skip
        if isinstance(answer, Update):
            self._deps.link.send_job(answer.device, UpdateRefused(job=plan.job, round=number, reason=reason))

    def leave(self) -> None:
        """Leave the devices to other jobs."""
        self._choice.end()

    def end(self) -> None:
        """Tell all participants that the job has ended."""
        for device in sorted(self._took_part):
            ended = RoundClosed(job=self._job.id, round=self._job.config.rounds.count, job_ended=True)
            self._deps.link.send_job(device, ended)

    def _open(self, plan: Plan) -> OpenRound:
        kept = self.published(plan.parameters)
        self._model_sha256 = kept.sha256
        assignment = self._assignment(plan, self._sent_model(plan, kept))
        around = Surroundings(clock=self._deps.clock, storage=self._deps.storage)
        opened = OpenRound(assignment, sorted(plan.clients), self._terms(plan), around, plan.owed)
        opened.region_rounds = self._job.config.tiers.region_rounds
        opened.unreachable = functools.partial(unreachable, self._job.config)
        self._choice.chosen(plan.clients)
        self._choice.next_round = plan.round + 1
        for answer in self.insist(
            lambda: self._deps.jobs.open_round(
                plan.job, plan.round, plan.clients, self._choice.not_chosen(), with_late=bool(plan.owed)
            )
        ):
            opened.accept(answer, lambda _answer: None)  # it is already durable
        self._fail_older_agents(opened)
        self._deps.rounds.add(opened)
        event(_log, logging.INFO, "round.open", job=plan.job, round=plan.round, cohort=len(plan.clients),
              waiting=len(opened.waiting()))  # fmt: skip
        opened.begin()
        opened.note(self._presence())  # devices that went offline before
        self._took_part |= set(plan.clients)
        return opened

    def _assignment(self, plan: Plan, model: BlobRef) -> Fit | Evaluate:
        job, model_blake3 = self._job, self._deps.blobs.check(model.sha256)
        if not plan.fit:
            return Evaluate(
                job=plan.job,
                round=plan.round,
                model=model,
                model_blake3=model_blake3,
                bundle=job.bundle,
                seed=plan.train.seed,
                workers=plan.train.workers,
                deadline_s=plan.deadline_s,
                max_update_bytes=HEADER_SLACK_BYTES,
                frozen=on_devices(job.frozen, job.division),
                parted=job.parted,
            )
        fragment = self._sent_fragment(plan)
        return Fit(
            job=plan.job,
            round=plan.round,
            model=model,
            model_blake3=model_blake3,
            bundle=job.bundle,
            train=plan.train,
            deadline_s=plan.deadline_s,
            max_update_bytes=whole_bytes(sent_part(plan.parameters, plan.train)) + HEADER_SLACK_BYTES,
            frozen=on_devices(job.frozen, job.division),
            parted=job.parted,
            evaluate=plan.evaluate,
            takes_late=self._takes_late(plan),
            fragment=fragment,
            fragment_blake3="" if fragment is None else self._deps.blobs.check(fragment.sha256),
        )

    def _close(self, plan: Plan) -> None:
        """Ask no region any more for its part in the round."""
        self._deps.link.close_round(plan.job, plan.round)

    def _terms(self, plan: Plan) -> Terms:
        return Terms.of_round(self._job.config.rounds, plan.deadline_s, plan.clients, self._durations)

    def _fail_older_agents(self, opened: OpenRound) -> None:
        """Do not wait for devices whose agents do not know this kind of assignment."""
        assignment, lacks = opened.assignment, self._deps.rounds.lacks
        reason = f"its agent does not know assignments of the kind {assignment.kind!r}; {UPDATE_AGENT}"
        record = functools.partial(self._deps.jobs.record, assignment.job, assignment.round)
        for device in sorted(one for one in opened.waiting() if lacks(one, assignment.kind)):
            self.insist(functools.partial(opened.accept, AnswerRow(device=device, reason=reason), record))

    def _presence(self) -> Presence:
        """Return who is online; a device that has a parent at which it cannot answer is away until it has another."""
        found, config = Presence.of(self._deps.link), self._job.config
        if self._takes_any_parent():
            return found
        away = frozenset(one for one in found.online if unreachable(config, self._deps.link.via(one)))
        return dataclasses.replace(found, online=found.online - away, offline=found.offline | away)

    def _takes_any_parent(self) -> bool:
        """Whether devices can answer wherever they are connected."""
        return self._job.config.tiers.region_rounds == 1 and rule_kind(self._job.config.aggregation.rule).merges

    def _execute(self, instruction: Instruction, opened: OpenRound) -> None:
        """Send a device its assignment, or that its round is closed."""
        assignment, link = opened.assignment, self._deps.link
        if isinstance(instruction, Announce):
            if not self._takes_any_parent() and opened.unreachable(link.via(instruction.device)):
                return
            link.send_job(instruction.device, assignment)
        # Not for an interrupted job: `end` tells all devices, or this round is resumed after a restart.
        elif isinstance(assignment, Fit) and assignment.takes_late:
            return  # the device works on: see `_tell_owed`
        elif isinstance(instruction, GiveUp) and not self._deps.rounds.is_stopped(assignment.job):
            closed = RoundClosed(job=assignment.job, round=assignment.round, job_ended=False)
            link.send_job(instruction.device, closed)

    def _as_record(self, answer: AnswerRow, plan: Plan) -> Update | Evaluated | Failure:
        job, number, device = plan.job, plan.round - answer.late, answer.device
        if answer.file is None:
            reason = answer.reason or "no reason given"
            return Failure(job=job, round=number, device=device, reason=reason, refused=bool(answer.refused))
        if not plan.fit:
            return Evaluated(job=job, round=number, device=device, evaluation=answer.evaluation or NO_EVALUATION)
        tree = self._deps.spool.tree(answer.file)
        return Update(
            job=job, round=number, device=device, tree=tree, weight=answer.weight, metrics=answer.metrics,
            evaluation=answer.evaluation,
        )  # fmt: skip
