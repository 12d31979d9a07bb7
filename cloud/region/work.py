"""What a region does for its parent: it asks its devices, folds their updates, and sends the sum.

For each round of a job there is one thread while there is something to do. A device that joins later, because it has
moved here, is asked too; its answer is in a further sum.
Invariant: answers are durable here until the parent says that the round is over (its entry is deleted), so a sum can
be folded again after a kill, or without devices that the parent has counted elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from cloud.dataplane.grpc_fleet import FleetDependencies, GrpcFleet
from cloud.region.sums import Folding
from cloud.region.uplink import SumFile
from cloud.state.blobs import blake3_of
from cloud.state.jobs import JobRow
from edgefl.aggregation.regional import regional_round, regional_step
from edgefl.config import JobConfig, TrainConfig
from edgefl.errors import CloudStopping, EdgeflError, JobCancelled
from edgefl.exchange import Terms
from edgefl.logs import event
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import BlobRef, Evaluate, Fit
from edgefl.protocols.tiers import Work
from edgefl.records import Plan
from edgefl.trees import SpooledTree, Tree, write_tree

MAX_ROUNDS = 16  # at work at the same time

_log = logging.getLogger(__name__)
Key = tuple[str, int]  # job, round


class RegionFleet(GrpcFleet):
    """The devices of one region in one round, asked as the parent says, or from the region's own parameters."""

    def __init__(self, job: JobRow, deps: FleetDependencies, work: Work) -> None:
        super().__init__(job, deps)
        self._work = work

    def _assignment(self, plan: Plan, model: BlobRef) -> Fit | Evaluate:  # noqa: ARG002 - all else is the parent's
        asked = self._work.assignment
        if model == asked.model:
            return asked
        return dataclasses.replace(asked, model=model, model_blake3=self._deps.blobs.check(model.sha256))

    def _terms(self, plan: Plan) -> Terms:
        return Terms(deadline_s=plan.deadline_s, offline_grace_s=self._work.offline_grace_s)


@dataclass(slots=True)
class _Round:
    """One round that the parent has open."""

    work: Work
    number: int  # of the devices' round that is open, or was last; with regional rounds not the parent's
    done: set[str] = field(default_factory=set)  # devices in a sum that the parent has answered for
    numbers: set[int] = field(default_factory=set)  # of all of the devices' rounds
    models: set[str] = field(default_factory=set)  # of regional rounds, by SHA-256
    sums: int = 0
    is_running: bool = False
    is_over: bool = False


class RegionWork:
    """All rounds of a region. `take` may be called from any thread."""

    def __init__(
        self, deps: FleetDependencies, folder: Path, fetch: Callable[[str], None],
        send: Callable[[SumFile], pb.UploadState],
    ) -> None:  # fmt: skip
        self._deps, self._folder, self._fetch, self._send = deps, folder, fetch, send
        folder.mkdir(mode=0o700, exist_ok=True)
        for left_over in folder.iterdir():  # of a killed process
            left_over.unlink()
        self._lock = threading.RLock()
        self._rounds: dict[Key, _Round] = {}
        self._threads = ThreadPoolExecutor(MAX_ROUNDS, "region-round")
        self.on_crash: Callable[[BaseException], object] = lambda _error: None

    def take(self, job: str, number: int, work: Work | None) -> None:
        """Take the parent's present wish for a round; None = it is over."""
        key = job, number
        if work is None:
            self._end(key)
            return
        with self._lock:
            one = self._rounds.setdefault(key, _Round(work, number))
            one.work = work
            opened = self._deps.rounds.get(job, one.number)
            if one.is_running and opened is not None:
                opened.join(set(work.devices) - one.done)
            else:
                self._start(key, one)

    def close(self) -> None:
        """Stop all rounds; they continue at the next start."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, key: Key, one: _Round) -> None:
        """Start a thread for the round, if a device is still to be asked. The caller has the lock."""
        if one.is_running or one.is_over or not set(one.work.devices) - one.done:
            return
        one.is_running = True
        self._threads.submit(self._run, key, one)

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
        except BaseException as bug:  # noqa: BLE001 - the thread's outermost line
            _log.critical("round.crashed job=%s round=%s", job, number, exc_info=bug)
            self.on_crash(bug)
            return
        with self._lock:
            one.is_running = False
            if one.is_over:
                self._drop(key)
            else:
                self._start(key, one)  # devices that joined meanwhile

    def _answer(self, key: Key, one: _Round) -> None:
        """Ask the devices, fold what they send, and send it up; with regional rounds several times, then the change."""
        with self._lock:
            work = one.work
        assignment, times = work.assignment, work.region_rounds if work.fit is not None else 1
        self._fetch(assignment.model.sha256)
        first: Tree = SpooledTree(self._deps.blobs.path(assignment.model.sha256))
        parameters, end_s = first, self._deps.clock() + assignment.deadline_s
        evaluated: Folding | None = None
        for regional in range(times):
            left_s = max(0.0, end_s - self._deps.clock()) / (times - regional)
            asked = _in_region(work, key[1], regional, left_s)
            folding, fleet = self._ask(key, one, asked, parameters)
            evaluated = evaluated or folding
            if regional < times - 1 and folding.weights:
                kept = fleet.keep(regional_step(parameters, folding.mean()))
                parameters, one.models = kept, {*one.models, kept.path.name}
        folding.evaluated = evaluated
        folding.base = None if parameters is first else (first, parameters)
        self._deliver(key, one, folding, fleet)

    def _ask(self, key: Key, one: _Round, work: Work, parameters: Tree) -> tuple[Folding, GrpcFleet]:
        """Run one round of this region's devices, from these parameters; return what they sent."""
        assignment = work.assignment
        with self._lock:
            one.number = assignment.round
            one.numbers.add(one.number)
            wanted = set(one.work.devices)
        # Also those that have moved away, if their answers are here: perhaps nowhere else.
        known = {row.device for row in self._deps.jobs.open_round(key[0], one.number, sorted(wanted))}
        plan = _plan(assignment, tuple(sorted((wanted | known) - one.done)), parameters)
        fleet = RegionFleet(_job_row(assignment), self._deps, work)
        folding = Folding(plan)
        for answer in fleet.collect(plan):
            folding.add(answer)
        return folding, fleet

    def _deliver(self, key: Key, one: _Round, folding: Folding, fleet: GrpcFleet) -> None:
        """Send a sum; fold it again without the devices that the parent names."""
        job, number = key
        without: set[str] = set()
        while (note := folding.note()).devices and not one.is_over:
            one.sums += 1
            path = self._folder / f"{job}-{number}-{one.sums}"
            try:
                fleet.insist(functools.partial(_write, folding.mean(), path))
                state = self._send(SumFile(
                    job=job, round=number, number=one.sums, path=path, blake3=blake3_of(path), note=note,
                ))  # fmt: skip
            finally:
                path.unlink(missing_ok=True)
            event(_log, logging.INFO, f"sum.{pb.UploadState.Status.Name(state.status).lower()}", job=job, round=number,
                  contributors=len(note.weights), failed=len(note.failed), reason=state.reason or "-")  # fmt: skip
            if state.status != pb.UploadState.REFOLD:
                one.done |= note.devices
                return
            without |= set(state.without)
            one.done |= set(state.without)
            folding = self._folded_again(folding, fleet, note.devices - without)

    def _folded_again(self, former: Folding, fleet: GrpcFleet, devices: set[str]) -> Folding:
        plan = former.plan
        folding = Folding(plan, base=former.base, evaluated=former.evaluated if former.base is not None else None)
        rows = [row for row in self._deps.jobs.open_round(plan.job, plan.round, plan.clients) if row.device in devices]
        for answer in fleet.records(rows, plan):
            folding.add(answer)
        return folding

    def _end(self, key: Key) -> None:
        with self._lock:
            one = self._rounds.get(key)
            if one is None:
                return
            one.is_over = True
            opened = self._deps.rounds.get(key[0], one.number)
            if opened is not None:
                opened.interrupt(JobCancelled("the parent has closed the round"))
            if not one.is_running:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        """Forget a round. The caller has the lock."""
        one = self._rounds.pop(key)
        for number in one.numbers:
            self._deps.jobs.forget_round(key[0], number)
            self._deps.spool.drop_round(key[0], number)
        still = {ref.sha256 for other in self._rounds.values() for ref in other.work.assignment.blobs()}
        for model in {one.work.assignment.model.sha256, *one.models} - still:
            self._deps.blobs.delete(model)


def _in_region(work: Work, number: int, regional: int, deadline_s: float) -> Work:
    """Return what the devices are asked in one of the regional rounds (from 0) of the parent's round."""
    if work.fit is None or work.region_rounds == 1:
        return work
    fit = dataclasses.replace(
        work.fit, round=regional_round(number, regional, work.region_rounds), deadline_s=deadline_s,
        evaluate=work.fit.evaluate and regional == 0,
    )  # fmt: skip
    return dataclasses.replace(work, fit=fit)


def _plan(assignment: Fit | Evaluate, devices: tuple[str, ...], parameters: Tree) -> Plan:
    is_fit = isinstance(assignment, Fit)
    return Plan(
        job=assignment.job, round=assignment.round, parameters=parameters, clients=devices,
        train=assignment.train if isinstance(assignment, Fit) else TrainConfig(seed=assignment.seed),
        deadline_s=assignment.deadline_s, evaluate=not isinstance(assignment, Fit) or assignment.evaluate, fit=is_fit,
    )  # fmt: skip


def _job_row(assignment: Fit | Evaluate) -> JobRow:
    return JobRow(
        id=assignment.job, state="running", bundle=assignment.bundle, config=JobConfig(), buffers=(), rounds_done=0,
        model=assignment.model, optimizer_sha256=None, cohort=(), parted=assignment.parted, frozen=assignment.frozen,
    )  # fmt: skip


def _write(tree: Tree, path: Path) -> None:
    with path.open("wb") as file:
        write_tree(tree, file)
