"""The deployed fleet: plans announced over MQTT, models and updates over gRPC (see `FleetService`).

A round ends when everyone has answered, at its deadline, or, once the quorum has answered, when all
that are missing have been offline for the grace time.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cloud.broker.link import CloudLink
from cloud.dataplane.open_rounds import OpenRound, OpenRounds
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Answer, JobRow, Jobs
from cloud.state.spool import Spool
from cloud.state.storage import LOOK_S, Storage
from edgefl.errors import EdgeflError
from edgefl.logs import event
from edgefl.protocols.messages import BlobRef, RoundClosed, UpdateRefused, WirePlan
from edgefl.records import Failure, Plan, Traffic, Update
from edgefl.trees import SpooledTree, Tree, encoded_bytes
from edgefl.trees.frozen import whole

RETURN_S = 20.0  # for a device that has not been heard of since the cloud's start
HEADER_SLACK_BYTES = 64 << 10  # another writer's header may be longer than ours

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FleetParts:
    """What every job's fleet works on."""

    rounds: OpenRounds
    jobs: Jobs
    blobs: BlobStore
    spool: Spool
    link: CloudLink
    storage: Storage = field(default_factory=Storage)
    clock: Callable[[], float] = time.monotonic


class GrpcFleet:
    """The fleet of one job, as `run_rounds` sees it. Used from the job's own thread."""

    def __init__(self, job: JobRow, parts: FleetParts) -> None:
        self._job = job
        self._parts = parts
        self._took_part: set[str] = set()
        self._begun_from: str | None = None  # the model of the round that is open

    def clients(self) -> Sequence[str]:
        """Return the devices online, once as many as wanted are there.

        The first round waits up to `rounds.wait_s` for them; later ones only `rounds.offline_grace_s`
        where the quorum is there. Raises what the job was interrupted with.
        """
        rounds, link = self._job.config.rounds, self._parts.link

        def are_there(num_devices: int) -> bool:
            return self._parts.rounds.is_stopped(self._job.id) or len(link.online()) >= num_devices

        wanted = max(rounds.clients, rounds.quorum)
        first_wait_s = rounds.offline_grace_s if self._took_part else rounds.wait_s
        if not link.wait_until(lambda: are_there(wanted), first_wait_s):
            link.wait_until(lambda: are_there(rounds.quorum), rounds.wait_s - first_wait_s)
        self._parts.rounds.refuse_stopped(self._job.id)
        return sorted(link.online())

    def keep(self, parameters: Tree) -> SpooledTree:
        """Encode the parameters, once for all devices, and go on with the file: it is mapped when it is needed.

        Raises BlobDamaged where the file that the round began from, which they were computed of, has changed.
        """
        if self._begun_from is not None:
            self._parts.blobs.check(self._begun_from)
        ref = self.insist(lambda: self._parts.blobs.put_tree(parameters), encoded_bytes(parameters))
        return SpooledTree(self._parts.blobs.path(ref.sha256))

    def assembled(self, parameters: Tree) -> BlobRef | None:
        """Return the blob of a job's last model, whole; None where its parameters are that."""
        if self._job.frozen is None:
            return None
        frozen = SpooledTree(self._parts.blobs.path(self._job.frozen.sha256))
        tensors = whole(parameters, frozen)
        return self.insist(lambda: self._parts.blobs.put_tree(tensors), encoded_bytes(tensors))

    def insist(self, call: Callable[[], _T], num_bytes: int = 0) -> _T:
        """Write something durable: waits while the disk is full; raises what the job was interrupted with."""
        return self._parts.storage.insist(call, lambda: self._parts.rounds.refuse_stopped(self._job.id), num_bytes)

    def published(self, parameters: Tree) -> BlobRef:
        """Return the blob that `keep` made of a round's parameters, or makes it."""
        kept = parameters if isinstance(parameters, SpooledTree) else self.keep(parameters)
        return BlobRef(sha256=kept.path.name, size=kept.path.stat().st_size)

    def collect(self, plan: Plan) -> Iterator[Update | Failure]:
        """Announce the plan and yield what comes, first what had come before a restart."""
        opened = self._open(plan)
        try:
            yield from self._arrivals(opened, plan)
        finally:
            left = opened.close()
            self._parts.rounds.remove(opened)
            # Of an interrupted job nobody is told here: it is ended in `end`, or goes on with this very round.
            for device in left if not self._parts.rounds.is_stopped(plan.job) else ():
                self._parts.link.send_job(device, RoundClosed(job=plan.job, round=plan.round, job_ended=False))

    def traffic(self) -> Traffic:
        return self._parts.rounds.traffic(self._job.id)

    def refuse(self, plan: Plan, update: Update, reason: str) -> None:
        """Log a guard's refusal and tell the device."""
        event(_log, logging.WARNING, "update.refused", job=plan.job, round=plan.round, device=update.device,
              reason=reason)  # fmt: skip
        self._parts.link.send_job(update.device, UpdateRefused(job=plan.job, round=plan.round, reason=reason))

    def end(self) -> None:
        """Tell the devices that took part that no round will follow."""
        for device in sorted(self._took_part):
            ended = RoundClosed(job=self._job.id, round=self._job.config.rounds.count, job_ended=True)
            self._parts.link.send_job(device, ended)

    def _open(self, plan: Plan) -> OpenRound:
        model = self.published(plan.parameters)
        self._begun_from = model.sha256
        wire = WirePlan(
            job=plan.job,
            round=plan.round,
            model=model,
            model_blake3=self._parts.blobs.check(model.sha256),
            bundle=self._job.bundle,
            train=plan.train,
            deadline_s=plan.deadline_s,
            max_update_bytes=encoded_bytes(plan.parameters) + HEADER_SLACK_BYTES,
            frozen=self._job.frozen,
            parted=self._job.parted,
        )
        opened = OpenRound(wire, frozenset(plan.clients))
        for answer in self.insist(lambda: self._parts.jobs.open_round(plan.job, plan.round, plan.clients)):
            opened.accept(answer, lambda _answer: None)  # it is durable already
        self._parts.rounds.add(opened)
        waiting = opened.waiting()
        event(_log, logging.INFO, "round.open", job=plan.job, round=plan.round, cohort=len(plan.clients),
              waiting=len(waiting))  # fmt: skip
        self._announce(opened)
        self._took_part |= set(plan.clients)
        return opened

    def _announce(self, opened: OpenRound) -> None:
        for device in sorted(opened.waiting()):
            self._parts.link.send_job(device, opened.plan)

    def _arrivals(self, opened: OpenRound, plan: Plan) -> Iterator[Update | Failure]:
        until = _Deadline(plan.deadline_s, self._parts.storage, self._parts.clock)
        offline_since_s: dict[str, float] = {}
        num_updates = num_taken = 0
        self._note_presence(opened, offline_since_s)  # who went before the round began, or with the last cloud
        while num_taken < len(opened.cohort):
            if until.resumed():  # those that gave up sending do not know
                self._announce(opened)
            given_up_s = float("inf")
            if num_updates >= self._job.config.rounds.quorum:
                given_up_s = self._given_up_s(opened, offline_since_s)
            try:
                event_ = opened.events.get(timeout=until.wait_s(given_up_s))
            except queue.Empty:
                if until.is_over(given_up_s):
                    return
                continue
            if isinstance(event_, EdgeflError):
                raise event_
            if isinstance(event_, Answer):
                answer = opened.counted(event_)
                num_taken += 1
                num_updates += answer.file is not None
                yield self._as_record(answer, plan)
            else:
                opened.presence_pending = False
                self._note_presence(opened, offline_since_s)

    def _note_presence(self, opened: OpenRound, offline_since_s: dict[str, float]) -> None:
        link = self._parts.link
        now_s, heard_of = self._parts.clock(), link.offline()
        gone = frozenset() if link.reason else opened.waiting() - link.online()  # without a broker, nobody is known
        for device in gone:
            since_s = now_s if device in heard_of else now_s + RETURN_S
            offline_since_s[device] = min(since_s, offline_since_s.get(device, since_s))
        for device in offline_since_s.keys() - gone:
            del offline_since_s[device]

    def _given_up_s(self, opened: OpenRound, offline_since_s: dict[str, float]) -> float:
        """Return when the last missing device will have been offline for the grace time."""
        waiting = opened.waiting()
        if not waiting or waiting - offline_since_s.keys():
            return float("inf")
        return max(offline_since_s[device] for device in waiting) + self._job.config.rounds.offline_grace_s

    def _as_record(self, answer: Answer, plan: Plan) -> Update | Failure:
        job, number, device = plan.job, plan.round, answer.device
        if answer.file is None:
            return Failure(job=job, round=number, device=device, reason=answer.reason or "no reason given")
        tree = SpooledTree(self._parts.spool.path(answer.file))
        return Update(job=job, round=number, device=device, tree=tree, weight=answer.weight, metrics=answer.metrics)


class _Deadline:
    """A round's deadline, which does not run while updates cannot be stored."""

    def __init__(self, seconds: float, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._clock = storage, clock
        self._end_s = clock() + seconds
        self._before_s = storage.paused_s()
        self._was_paused = False

    def wait_s(self, given_up_s: float) -> float:
        """Return how long to wait for the next event: during a pause, no longer than until the next look."""
        left_s = max(0.0, min(self._until_s(), given_up_s) - self._clock())
        if self._storage.look():
            return left_s
        self._was_paused = True
        return LOOK_S

    def is_over(self, given_up_s: float) -> bool:
        return self._storage.look() and self._clock() >= min(self._until_s(), given_up_s)

    def resumed(self) -> bool:
        """Whether a pause is over; says it once."""
        if not self._was_paused or not self._storage.look():
            return False
        self._was_paused = False
        return True

    def _until_s(self) -> float:
        return self._end_s + self._storage.paused_s() - self._before_s
