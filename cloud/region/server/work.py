"""What a region does for its parent: it asks its devices, folds their updates, and sends the sum.

For each round of a job there is one thread while there is something to do. A device that joins later, because it has
moved here, is asked too; its answer is in a further sum.
If the parent has counted a device elsewhere, the sum is folded again without it. If that device is inside the sum of a
region below, that sum is given up, the others go up at once, and the region below is asked for a sum without it.
Invariant: answers are durable here until the parent says that the round is over, or starts the next one of its job, so
a sum can be folded again after a kill of any tier.
"""

from __future__ import annotations

import functools
import logging
import secrets
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from sqlalchemy.exc import SQLAlchemyError

from cloud.dataplane.grpc_fleet import FleetDependencies, GrpcFleet
from cloud.region.region_fleet import CLOSED, RegionFleet, in_region, job_row, plan_of
from cloud.region.server.regional_notes import SUFFIX, Reached, RegionalNotes
from cloud.region.server.uplink import SumFile
from cloud.region.sums import Folding
from edgefl.errors import CloudStopping, EdgeflError, JobCancelled, ProtocolError
from edgefl.hashing import HashingFile
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import Fit
from edgefl.protocols.tiers import Work
from edgefl.records import RegionRound
from edgefl.trees import SpooledTree, Tree, write_tree

MAX_ROUNDS = 16  # at work at the same time
RETRY_S = 1.0  # after a failure of a round here, e.g. of its model's download

_log = logging.getLogger(__name__)
Key = tuple[str, int]  # job, round


@dataclass(slots=True)
class _Round:
    """One round that the parent has open."""

    work: Work
    number: int  # of the devices' round that is open, or was last; with regional rounds not the parent's
    done: set[str] = field(default_factory=set)  # devices in a sum that the parent has answered for
    numbers: set[int] = field(default_factory=set)  # of all of the devices' rounds
    models: set[str] = field(default_factory=set)  # of regional rounds, by SHA-256
    reached: Reached | None = None  # the regional round that is open; None = the first, or there is but one
    refused: set[str] = field(default_factory=set)  # devices in a sum that the parent has refused
    again: set[str] = field(default_factory=set)  # devices to be asked again, because a sum was given up
    is_running: bool = False
    is_over: bool = False
    reopened: Work | None = None  # asked while it ends


class RegionWork:
    """All rounds of a region. `take` may be called from any thread."""

    def __init__(
        self, deps: FleetDependencies, folder: Path, fetch: Callable[[str], None],
        send: Callable[[SumFile], pb.UploadState],
    ) -> None:  # fmt: skip
        self._deps, self._folder, self._fetch, self._send = deps, folder, fetch, send
        folder.mkdir(mode=0o700, exist_ok=True)
        for left_over in folder.iterdir():  # of a killed process
            if left_over.suffix != SUFFIX:
                left_over.unlink()
        self._notes = RegionalNotes(folder)
        self._lock = threading.RLock()
        self._rounds: dict[Key, _Round] = {}
        self._ended: dict[str, int] = {}  # job -> its latest round that is over
        self._closing = threading.Event()
        self._threads = ThreadPoolExecutor(MAX_ROUNDS, "region-round")
        self.place = ("", "")  # this region's name and its parent's
        self.on_crash: Callable[[BaseException], object] = lambda _error: None

    def take(self, job: str, number: int, work: Work | None) -> None:
        """Take the parent's present wish for a round; None = it is over. Raises ProtocolError."""
        key = job, number
        if work is None:
            self._end(key)
            return
        _ = work.assignment
        with self._lock:
            for older in [one for one in self._rounds if one[0] == job and one[1] < number]:
                self._end(older)
            one = self._rounds.get(key)
            if one is not None and one.work.assignment.model != work.assignment.model:
                self._end(key)  # the parent begins again, from another model
                self._ended.pop(job, None)
            one = self._rounds.get(key)
            if one is None:
                one = self._rounds[key] = self._begun(key, work)
            if one.is_over:
                one.reopened = work
                return
            left = set(one.work.devices) - set(work.devices) - one.done
            one.work = work
            one.done -= set(work.devices)  # it is asked again: a sum that it was in was given up
            opened = self._deps.rounds.get(job, one.number)
            if one.is_running and opened is not None:
                if new := set(work.devices) - one.refused - opened.asked:
                    # Those whose answers are here already, in a sum that was given up, are folded again afterwards.
                    opened.join(new - {row.device for row in self._deps.jobs.open_round(job, one.number, ())})
                opened.leave(left)  # they are elsewhere
            else:
                self._start(key, one)

    def _begun(self, key: Key, work: Work) -> _Round:
        """Return a round that is new to this process. The caller has the lock."""
        job, number = key
        for older in [one for one in self._notes.noted() if one[0] == job and one[1] < number]:
            if older not in self._rounds:  # otherwise it ends by itself
                self._forget(older)
        reached = self._notes.get(key)
        if reached is None:
            return _Round(work, number)
        if reached.first != work.assignment.model.sha256 or not all(map(self._deps.blobs.has, reached.models)):
            self._forget(key)
            return _Round(work, number)
        numbers = reached.numbers(number)
        return _Round(work, numbers[-1], numbers=set(numbers), models=set(reached.models), reached=reached)

    def keep_only(self, jobs: Collection[str]) -> None:
        """End the rounds of all other jobs, which have ended."""
        with self._lock:
            for key in [one for one in self._rounds if one[0] not in jobs]:
                self._end(key)
            self._ended = {job: number for job, number in self._ended.items() if job in jobs}
            for key in [one for one in self._notes.noted() if one[0] not in jobs and one not in self._rounds]:
                self._forget(key)  # it ended while this region was down

    def is_over(self, job: str, number: int) -> bool:
        """Whether a round of a job that has not ended is known to be over."""
        with self._lock:
            now = [one.number for key, one in self._rounds.items() if key[0] == job and not one.is_over]
            return number <= self._ended.get(job, -1) or number < min(now, default=number)

    def close(self) -> None:
        """Stop all rounds; they continue at the next start."""
        self._closing.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, key: Key, one: _Round) -> None:
        """Start a thread for the round, if a device is still to be asked. The caller has the lock."""
        if one.is_running or one.is_over or self._closing.is_set() or not self._pending(key, one):
            return
        one.is_running = True
        self._threads.submit(self._run, key, one)

    def _pending(self, key: Key, one: _Round) -> set[str]:
        """Return the devices that are asked, or whose answers are here, perhaps nowhere else, and not yet sent."""
        here = set()
        if one.work.region_rounds == 1 or one.number in one.numbers:  # otherwise it is still the parent's number
            here = {row.device for row in self._deps.jobs.open_round(key[0], one.number, ())}
        return {*one.work.devices, *one.again, *here} - one.done - one.refused

    def _run(self, key: Key, one: _Round) -> None:
        job, number = key
        try:
            self._answer(key, one)
        except CloudStopping:
            return
        except JobCancelled:
            event(_log, logging.INFO, "round.closed", job=job, round=number)
        except (EdgeflError, OSError, SQLAlchemyError) as error:
            event(_log, logging.ERROR, "round.failed", job=job, round=number, reason=error)
            self._closing.wait(RETRY_S)
        except BaseException as bug:  # noqa: BLE001 - the thread's outermost line
            _log.critical("round.crashed job=%s round=%s", job, number, exc_info=bug)
            self.on_crash(bug)
            return
        with self._lock:
            one.is_running = False
            if one.is_over:
                self._drop(key)
                if one.reopened is not None:
                    self._ended.pop(job, None)
                    self.take(job, number, one.reopened)
            else:
                self._start(key, one)  # devices that joined meanwhile

    def _answer(self, key: Key, one: _Round) -> None:
        """Ask the devices, fold what they send, and send it up; with regional rounds several times, then the change."""
        with self._lock:
            work = one.work
        assignment, times = work.assignment, work.region_rounds if work.fit is not None else 1
        self._fetch(assignment.model.sha256)
        first: Tree = SpooledTree(self._deps.blobs.path(assignment.model.sha256))
        begin_s, before = self._deps.clock(), self._deps.rounds.traffic(key[0])
        parameters, end_s, begun = first, begin_s + assignment.deadline_s, 0
        evaluated: Folding | None = None
        if one.reached is not None:
            begun, parameters = one.reached.regional, SpooledTree(self._deps.blobs.path(one.reached.models[-1]))
            evaluated = self._evaluated(key, work, first) if work.fit is not None and work.fit.evaluate else None
        for regional in range(begun, times):
            left_s = max(0.0, end_s - self._deps.clock()) / (times - regional)
            asked = in_region(work, key[1], regional, left_s)
            folding, fleet = self._ask(key, one, asked, parameters)
            evaluated = evaluated or folding
            if regional < times - 1:
                if folding.weights:
                    parameters = fleet.keep(folding.step(parameters))
                self._reach(key, one, fleet, regional + 1, parameters)
        folding.evaluated = evaluated
        moved, (name, parent) = self._deps.rounds.traffic(key[0]) - before, self.place
        took = RegionRound(
            parent=parent, seconds=self._deps.clock() - begin_s, up_bytes=moved.up_bytes, down_bytes=moved.down_bytes
        )
        folding.part = (name, took) if name else None
        folding.base = None if parameters is first else (first, parameters)
        self._deliver(key, one, folding, fleet, assignment.model.sha256)

    def _reach(self, key: Key, one: _Round, fleet: GrpcFleet, regional: int, parameters: Tree) -> None:
        """Note durably with which model the next regional round begins."""
        if not isinstance(parameters, SpooledTree):
            raise TypeError("a region's model is a file")
        former = [] if one.reached is None else one.reached.models
        reached = Reached(
            first=one.work.assignment.model.sha256, regional=regional, region_rounds=one.work.region_rounds,
            models=[*former, parameters.path.name],
        )  # fmt: skip
        one.models = {*reached.models}
        fleet.insist(functools.partial(self._notes.put, key, reached))
        one.reached = reached

    def _forget(self, key: Key) -> None:
        """Forget a round of which this process knows no more than what is noted."""
        if (reached := self._notes.get(key)) is not None:
            for number in reached.numbers(key[1]):
                self._deps.jobs.forget_round(key[0], number)
                self._deps.spool.drop_round(key[0], number)
            for model in reached.models:
                self._deps.blobs.delete(model)
            self._notes.drop(key)

    def _evaluated(self, key: Key, work: Work, first: Tree) -> Folding:
        """Return what the devices sent for the first regional round of one that continues: their evaluations."""
        asked = in_region(work, key[1], 0, work.assignment.deadline_s)
        plan = plan_of(asked.assignment, (), first)
        folding, rows = Folding(plan), self._deps.jobs.open_round(key[0], plan.round, ())
        for answer in RegionFleet(job_row(asked.assignment), self._deps, asked).records(rows, plan):
            folding.add(answer)
        return folding

    def _ask(self, key: Key, one: _Round, work: Work, parameters: Tree) -> tuple[Folding, GrpcFleet]:
        """Run one round of this region's devices, from these parameters; return what they sent."""
        assignment = work.assignment
        with self._lock:
            if one.is_over:
                raise JobCancelled(CLOSED)
            one.number = assignment.round
            one.numbers.add(one.number)
            devices = tuple(sorted(self._pending(key, one)))
        plan = plan_of(assignment, devices, parameters)
        fleet = RegionFleet(job_row(assignment), self._deps, work, lambda: one.is_over)
        folding = Folding(plan)
        try:
            for answer in fleet.collect(plan):
                folding.add(answer)
        finally:
            fleet.leave()
        return folding, fleet

    def _deliver(self, key: Key, one: _Round, folding: Folding, fleet: GrpcFleet, model: str) -> None:
        """Send a sum, which began at the parent's `model`; fold it again without the devices that the parent names."""
        job, number = key
        without: set[str] = set()
        while (note := folding.note()).devices and not one.is_over:
            count = secrets.randbits(31)  # no number of an earlier process
            path = self._folder / f"{job}-{number}-{count}"
            try:
                digest = fleet.insist(functools.partial(_write, folding.mean(), path))
                state = self._send(SumFile(
                    job=job, round=number, number=count, path=path, blake3=digest, note=note, model=model,
                ))  # fmt: skip
            finally:
                path.unlink(missing_ok=True)
            event(_log, logging.INFO, f"sum.{pb.UploadState.Status.Name(state.status).lower()}", job=job, round=number,
                  contributors=len(note.weights), failed=len(note.failed), reason=state.reason or "-")  # fmt: skip
            with self._lock:
                if state.status == pb.UploadState.REFUSED:
                    one.refused |= note.devices
                if state.status != pb.UploadState.REFOLD:
                    one.done |= note.devices
                    one.again -= note.devices
                    return
                without |= set(state.without)
                one.done |= set(state.without)
                given_up = set(self._deps.jobs.withdraw_sums(job, folding.plan.round, without)) - without
                one.again = (one.again | given_up) - without
            folding = self._folded_again(folding, fleet, note.devices - without - given_up)

    def _folded_again(self, former: Folding, fleet: GrpcFleet, devices: set[str]) -> Folding:
        plan = former.plan
        folding = Folding(
            plan, base=former.base, part=former.part, evaluated=former.evaluated if former.base is not None else None
        )
        rows = [row for row in self._deps.jobs.open_round(plan.job, plan.round, plan.clients) if row.device in devices]
        for answer in fleet.records(rows, plan):
            folding.add(answer)
        return folding

    def _end(self, key: Key) -> None:
        with self._lock:
            one = self._rounds.get(key)
            if one is None:
                return
            one.is_over, one.reopened = True, None
            self._ended[key[0]] = max(one.number, self._ended.get(key[0], 0))
            opened = self._deps.rounds.get(key[0], one.number)
            if opened is not None:
                opened.interrupt(JobCancelled(CLOSED))
            if not one.is_running:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        """Forget a round. The caller has the lock."""
        one = self._rounds.pop(key)
        self._notes.drop(key)
        for number in one.numbers:
            self._deps.link.close_round(key[0], number)
            self._deps.jobs.forget_round(key[0], number)
            self._deps.spool.drop_round(key[0], number)
        still = {ref.sha256 for other in self._rounds.values() for ref in other.work.assignment.blobs()}
        asked = one.work.assignment
        fragments = {asked.fragment.sha256} if isinstance(asked, Fit) and asked.fragment is not None else set()
        for model in {asked.model.sha256, *fragments, *one.models} - still:
            self._deps.blobs.delete(model)


def round_in(key: str) -> tuple[str, int]:
    """Return the job and the round of a key of `work/`, or a relay and a message; raises ProtocolError."""
    _, job, number = (*key.split("/"), "", "")[:3]
    if not job or not number.isdecimal() or key.count("/") != 2:
        raise ProtocolError(f"{key[:80]!r} is no work of a round")
    return job, int(number)


def _write(tree: Tree, path: Path) -> str:
    """Write a sum; return the file's BLAKE3."""
    digest = blake3()
    with path.open("wb") as file:
        write_tree(tree, HashingFile(file, digest))
    return digest.hexdigest()
