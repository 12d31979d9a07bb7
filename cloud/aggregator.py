"""The cloud process: opens the home, starts the servers, and runs each job in its own thread.

From here to the averaging line: `run_job` -> `edgefl.rounds.run_rounds` -> `run_round` -> `Rule.add`.
After a kill at any time, the next process on the same home continues from the state in the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import json
import logging
import signal
from asyncio import sslproto
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import grpc
from sqlalchemy.exc import SQLAlchemyError

from cloud.dataplane.fleet_service import FleetService, ServiceDependencies, handler
from cloud.dataplane.grpc_fleet import GrpcFleet
from cloud.dataplane.grpc_port import GrpcPort
from cloud.http.api import make_app, serve_http
from cloud.jobs.slots import JobSlots
from cloud.region.service import TierDependencies, TierService, tier_handler
from cloud.servers import serve_grpc
from cloud.state.home import LOG_FILE, MAX_JOBS, AggregatorOptions, CloudHome
from cloud.state.jobs import UNFINISHED, JobRow
from cloud.trust.upkeep import Upkeep, interval_s
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.choosing.combined import LATE_NEXT
from edgefl.choosing.history import History
from edgefl.errors import CloudStopping, EdgeflError, JobCancelled, JobPaused
from edgefl.logs import event, logging_to
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.manifest import Bundle
from edgefl.protocols.messages import BlobRef, from_json
from edgefl.protocols.ports.http_limits import HttpLimits
from edgefl.protocols.tls import common_name, reloading, server_context
from edgefl.records import RoundOutcome
from edgefl.rounds import Job, LastEvaluation, evaluate_last, owed_after, run_rounds
from edgefl.stopping import EarlyStop, make_stop
from edgefl.trees import SpooledTree, Tree, is_large

EVALUATED_LATE = 100  # rounds in which an operator may still evaluate a model, for `rounds.stop`
TLS_BUFFER_BYTES = 64 << 10

# mallopt(3) of glibc: see `keep_freed_memory`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Aggregator:
    """One cloud process on one home."""

    def __init__(self, options: AggregatorOptions) -> None:
        self._options = options
        self.home = CloudHome(options)
        self._job_threads = ThreadPoolExecutor(MAX_JOBS, "job")
        self._slots = JobSlots(MAX_JOBS)
        self._relay_thread = ThreadPoolExecutor(1, "relays")

    def serve(self, on_ready: Callable[[str], None] = lambda _url: None) -> None:
        """Serve until SIGTERM or SIGINT; raises HomeError for an unusable home, ConfigError for a port in use.

        Raises PartFailed if a part failed and could not be restarted.
        """
        keep_freed_memory()
        shrink_tls_buffers()
        with self.home, logging_to(self._options.home / LOG_FILE):
            try:
                asyncio.run(self.run(on_ready))
            except Exception as error:
                if self.home.supervisor.failure is None:
                    raise
                raise self.home.supervisor.failure from error
        if self.home.supervisor.failure is not None:
            raise self.home.supervisor.failure

    def run_job(self, job_id: str) -> None:
        """Run one job to its end, from its state in the database."""
        home = self.home
        fleet: GrpcFleet | None = None
        try:
            row = self._insist(lambda: home.jobs.load(job_id))
            if row.state not in UNFINISHED or (row.state == "paused" and not row.cohort):
                return
            home.rounds.halt(job_id, halted=row.state == "paused")  # an open round ends first
            history = home.history_of(row)
            fleet = GrpcFleet(row, home.fleet_dependencies(), history)
            job = self._prepare(row, fleet, history)
            parameters: Tree = SpooledTree(home.blobs.path(row.model.sha256))
            done = row.rounds_done
            for outcome in run_rounds(job, fleet, parameters):
                self._commit(outcome, fleet, job)
                parameters, done = outcome.parameters, outcome.round
            last = evaluate_last(job, fleet, parameters, done=done)
            is_early = job.stop is not None and done < row.config.rounds.count
            stopped = job.stop.reason() if job.stop is not None and is_early else ""
            is_written = self._end(job_id, "done", model=fleet.assembled(parameters), last=last, stopped=stopped)
        except (CloudStopping, JobPaused) as pause:
            event(_log, logging.INFO, "job.paused", job=job_id, reason=pause)
            return
        except JobCancelled as stopped:
            is_written = self._end(job_id, "cancelled", str(stopped))
        except (EdgeflError, OSError, SQLAlchemyError) as error:
            is_written = self._end(job_id, "failed", str(error))
        except BaseException as bug:  # noqa: BLE001 - the thread's outermost line
            _log.critical("job.crashed job=%s", job_id, exc_info=bug)
            reason = f"a bug in edgefl: {bug!r:.500}; see the cloud's log"
            is_written = self._end(job_id, "failed", reason)
        finally:
            if fleet is not None:
                fleet.leave()
            home.rounds.forget(job_id)
            home.children.note_running()
        if not is_written:  # it continues at the next start, with the received updates
            return
        if fleet is not None:
            fleet.end()
        home.spool.drop_job(job_id)

    def _end(
        self, job_id: str, state: str, error: str | None = None, model: BlobRef | None = None,
        last: LastEvaluation | None = None, stopped: str = "",
    ) -> bool:  # fmt: skip
        """Store a job's end as soon as the disk permits; False if the cloud stops first, which resumes the job later.

        Raises permanent errors of the database, which stop the process (`_report_crash`).
        """
        level = logging.ERROR if state == "failed" else logging.INFO
        event(_log, level, f"job.{state}", job=job_id, error=error or "-", stopped=stopped or "-")
        try:
            self._insist(lambda: self.home.jobs.end(job_id, state, error, model, last, stopped))
        except CloudStopping:
            event(_log, logging.WARNING, "job.end_not_written", job=job_id, state=state)
            return False
        return True

    def _insist(self, call: Callable[[], _T]) -> _T:
        """Call a function that writes; retry while the disk or database is unavailable. Raises CloudStopping."""
        return self.home.storage.insist(call, self.home.rounds.refuse_stopping)

    def _prepare(self, row: JobRow, fleet: GrpcFleet, history: History | None) -> Job:
        """Return the job with the optimizer's state, and the cohort of the open round, if there is one."""
        step = ServerOptimizer(row.config.server, gradient=row.config.train.algorithm == "fedsgd", buffers=row.buffers)
        bundle = from_json(Bundle, json.loads(row.bundle.text))
        frozen_sha256 = row.frozen.sha256 if row.frozen is not None else None
        for sha256 in (row.model.sha256, frozen_sha256, bundle.blob.sha256, row.optimizer_sha256):
            if sha256 is not None:
                self.home.blobs.check(sha256)  # raises BlobDamaged
        if row.optimizer_sha256 is not None:
            step.load(SpooledTree(self.home.blobs.path(row.optimizer_sha256)))
        stop = make_stop(row.config.rounds.stop)
        if stop is not None:
            self._note_metrics(row.id, stop, 0)
        return Job(
            id=row.id,
            config=row.config,
            step=step,
            first_round=row.rounds_done + 1,
            cohort=row.cohort,
            owed=row.owed,
            on_refusal=fleet.refuse,
            keep=fleet.keep,
            evaluation=row.evaluation,
            history=history,
            stop=stop,
        )

    def _note_metrics(self, job_id: str, stop: EarlyStop, after: int) -> None:
        """Tell the early stop what is known of a job's rounds, with what operators have evaluated."""
        for outcome in self.home.jobs.rounds_after(job_id, after):
            stop.note(int(outcome["round"]), outcome["metrics"])

    def _commit(self, outcome: RoundOutcome, fleet: GrpcFleet, job: Job) -> None:
        """Make a round's outcome durable; the model first, because the commit refers to it."""
        optimizer, model = job.step.state(), fleet.published(outcome.parameters)
        learnt = {} if job.history is None else {name: job.history.of(name) for name in outcome.cohort()}
        state = fleet.insist(lambda: self.home.blobs.put_tree(optimizer).sha256) if optimizer else None
        kept = max(self._options.kept_rounds, self._options.kept_models + 1)
        owed = owed_after(outcome, job.config)
        frozen = fleet.fold_cloud_parts(outcome)
        fleet.insist(lambda: self.home.jobs.finish_round(outcome, model, state, kept, learnt, owed, frozen=frozen))
        if state is not None and is_large(optimizer):  # from now on it is read from its blob
            job.step.load(SpooledTree(self.home.blobs.path(state)))
        fleet.insist(lambda: self.home.jobs.forget_model_of(outcome.job, outcome.round - self._options.kept_models))
        self.home.spool.drop_round(outcome.job, outcome.round, owed)
        if job.config.rounds.late == LATE_NEXT:
            self.home.spool.drop_round(outcome.job, outcome.round - 1)  # late ones
        event(_log, logging.INFO, "round.done", job=outcome.job, round=outcome.round,
              admitted=len(outcome.admitted), rejected=len(outcome.rejected), failed=len(outcome.failed),
              missing=len(outcome.missing), seconds=outcome.seconds)  # fmt: skip
        if job.stop is not None:
            self._note_metrics(job.id, job.stop, max(0, outcome.round - EVALUATED_LATE))

    async def run(self, on_ready: Callable[[str], None]) -> None:
        """Serve in the running event loop; `serve` makes one."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        supervisor = self.home.supervisor
        supervisor.on_end = functools.partial(loop.call_soon_threadsafe, stop.set)
        jobs = self.home.jobs
        running, unfinished = jobs.running(), jobs.unfinished()
        running += [job for job in unfinished if job not in running and jobs.has_open_round(job)]  # to end that round
        self.home.relays.resume()
        self.home.spool.keep_only([*unfinished, *self.home.relays.running()])
        jobs.followers.expect_back(unfinished)
        self.home.rounds.expect(job for job in running if jobs.has_open_round(job))
        async with self.home.broker(), self._grpc_server(), self._http_server():
            supervisor.add_check("grpc", lambda: "")  # if it fails, this block ends
            supervisor.add_check("jobs", lambda: "")  # see `_report_crash`
            self.home.link.start()
            self._relay_thread.submit(supervisor.run, "relays", self.home.relays.watch)
            jobs.started, jobs.cancelled, jobs.queued = self._start, self._cancel, self._queued
            self.home.control.paused, self.home.control.resumed = self._pause, self._resume
            for job in running:
                self._start(job)
            event(_log, logging.INFO, "cloud.ready", url=self.home.url, grpc_port=self._options.grpc_port,
                  broker=self.home.broker_name, home=self._options.home)  # fmt: skip
            on_ready(self.home.url)
            await stop.wait()
            event(_log, logging.INFO, "cloud.stopping")
            supervisor.close()
            await asyncio.to_thread(self._stop_jobs)

    def _grpc_server(self) -> AbstractAsyncContextManager[None]:
        options, home = self._options, self.home
        loop = asyncio.get_running_loop()

        def handlers(port: GrpcPort, workers: ThreadPoolExecutor) -> list[grpc.GenericRpcHandler[Any, Any]]:
            deps = ServiceDependencies(
                rounds=home.rounds,
                jobs=home.jobs,
                blobs=home.blobs,
                spool=home.spool,
                desired_for=home.rollouts.desired_for,
                ended=self._ended,
                is_known=home.enrolment.is_known,
                storage=home.storage,
                broker_url=home.broker_url,
                parents_for=home.parents.of,
                renewals=home.enrolment.renewals,
                is_renewal_due=home.enrolment.renewals.is_due,
                ca_pem=home.identity.ca.read_bytes(),
                insecure=options.insecure,
                admit=port.admit,
                pace=port.pace,
                max_transfers=home.shares.transfers,
                logs=home.device_logs,
            )
            service = FleetService(deps, workers)
            home.cut += [service.forget, lambda device: loop.call_soon_threadsafe(port.drop, device)]
            tier = TierService(
                TierDependencies(
                    children=home.children, callers=service.callers, calls=service.calls, rounds=home.rounds,
                    jobs=home.jobs, blobs=home.blobs, spool=home.spool, storage=home.storage,
                    renew=self._renew_below,
                ),
                workers,
            )  # fmt: skip
            return [handler(service), tier_handler(tier)]

        identity = None if options.insecure else home.identity
        return serve_grpc(options.host, options.grpc_port, identity, home.shares, handlers)

    async def _renew_below(self, region: str, request: pb.RenewRequest) -> pb.RenewReply:
        """Answer a device's request for a certificate that a region passed on."""
        home = self.home
        renew = home.enrolment.renewals.renew_for
        certificate = await asyncio.to_thread(renew, request, region, home.children.speaks_for)
        await asyncio.to_thread(home.members.note_change)  # its regions expect the new certificate, too
        event(_log, logging.INFO, "device.renewed", device=common_name(certificate), region=region)
        return pb.RenewReply(certificate=certificate, ca=home.identity.ca.read_bytes())

    @contextlib.asynccontextmanager
    async def _http_server(self) -> AsyncIterator[None]:
        options, home = self._options, self.home
        context = None if options.insecure else server_context(home.identity, client_certificates=False)
        limits = HttpLimits(max_connections=home.shares.http)
        upkeep = Upkeep(
            home.renew_certificates,
            reloading(context, home.identity) if context is not None else lambda: None,
            lambda: interval_s(options.certificate_days),
            functools.partial(home.supervisor.report_failure, "certificates"),
        )
        home.supervisor.add_check("certificates", lambda: upkeep.reason)
        async with (
            serve_http(
                make_app(home.services()),
                options.host,
                options.http_port,
                context,
                limits,
                functools.partial(home.supervisor.report_failure, "https"),
            ),
            upkeep.running(),
        ):
            yield

    def _start(self, job_id: str) -> None:
        """Run a job as soon as it has a slot."""
        self._slots.add(job_id, self.home.control.priority(job_id))
        self._fill_slots()

    def _fill_slots(self) -> None:
        while (job_id := self._slots.next()) is not None:
            try:
                thread = self._job_threads.submit(self.run_job, job_id)
            except RuntimeError as error:  # no new thread; a running one may take the job later and finds it ended
                self._slots.done(job_id)
                self._end(job_id, "failed", f"the cloud could not start it: {error}")
            else:
                thread.add_done_callback(functools.partial(self._free_slot, job_id))

    def _free_slot(self, job_id: str, thread: Future[None]) -> None:
        self._report_crash(thread)
        self._slots.done(job_id)
        self._fill_slots()

    def _pause(self, job_id: str) -> None:
        self.home.rounds.halt(job_id)
        self.home.link.wake()

    def _resume(self, job_id: str) -> None:
        self.home.rounds.halt(job_id, halted=False)
        self._start(job_id)

    def _queued(self, job_id: str) -> str:
        """Return what a job waits for; empty if it works."""
        waiting = self._slots.waiting()
        if job_id in waiting:
            at = waiting.index(job_id) + 1
            return f"waiting for its turn: {MAX_JOBS} jobs run at a time; position {at} in the queue"
        return self.home.board.waits.get(job_id, "")

    def _cancel(self, job_id: str) -> None:
        self.home.rounds.interrupt(JobCancelled("cancelled by its operator"), job_id)
        self._wake()

    def _ended(self, held: Sequence[str]) -> list[str]:
        """Return those of the jobs held by a device that have ended."""
        if not held:
            return []
        return sorted(set(held) - set(self.home.relays.running()) - set(self.home.jobs.unfinished()))

    def _stop_jobs(self) -> None:
        self._slots.close()
        self.home.rounds.interrupt(CloudStopping("the cloud is stopping; its jobs continue at the next start"))
        self._wake()
        self.home.relays.close()
        self.home.link.close()
        self._relay_thread.shutdown(wait=True, cancel_futures=True)
        self._job_threads.shutdown(wait=True, cancel_futures=True)

    def _wake(self) -> None:
        self.home.link.wake()
        self.home.storage.wake()

    def _report_crash(self, future: Future[None]) -> None:
        """Stop the process if a job's thread failed without storing the job's end."""
        if not future.cancelled() and (error := future.exception()) is not None:
            self.home.supervisor.report_failure("jobs", error)


def keep_freed_memory() -> None:
    """Make malloc reuse the chunks' buffers instead of returning each to the system.

    By default glibc maps each buffer of megabytes anew, and the kernel clears its pages: half of the data plane's
    CPU time. Without mallopt (musl, macOS) the cloud is slower, but works.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_THRESHOLD, 8 << 20), (_M_TRIM_THRESHOLD, 16 << 20), (_M_ARENA_MAX, 2)):
            mallopt(parameter, value)


def shrink_tls_buffers() -> None:
    """Let asyncio's TLS connections read 64 kB at a time instead of 256: an idle device needs a third of the memory."""
    sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
