"""The split training's server: a process beside the cloud, on the same home, with a port and a certificate of its own.

It reads the cloud's database (who is enrolled, which rounds are open) and writes below HOME/split only. It does not
lock the home: the cloud does, and both run at the same time. Each job has a training process of its own, which runs the
task's code; the server itself never does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from cloud.aggregator import keep_freed_memory
from cloud.dataplane.callers import CallerChecks, Callers
from cloud.dataplane.grpc_port import GrpcPort, PortPace
from cloud.dataplane.running_calls import RunningCalls
from cloud.servers import PortKind, serve_grpc, unwrapped
from cloud.shares import Shares
from cloud.split.jobs import SplitJobs, TrainingSpec
from cloud.split.process import JobProcess, SessionEnded
from cloud.split.records import SessionSpec
from cloud.split.results import SplitFolder, folders_of_others
from cloud.split.service import CHUNK_BYTES, SplitLimits, SplitService, split_handler
from cloud.stages.known_devices import KnownDevices
from cloud.stages.server import REMOVED
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from cloud.trust.own_certificates import renew_server
from edgefl.errors import ConfigError, EdgeflError, HomeError, MissingExtra
from edgefl.logs import event
from edgefl.process.descriptors import raise_limit
from edgefl.process.home import check_home
from edgefl.protocols.addresses import is_loopback
from edgefl.protocols.manifest import load_private_key
from edgefl.protocols.split.messages import BeginTraining
from edgefl.protocols.tls import CLOUD_NAME, Identity

MESSAGES = PortPace(per_s=4000.0, burst=8000.0)  # of a device: chunks of its stream
_RENEW_S = 3600.0
_LOOK_S = 2.0  # after jobs that have ended

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitServerOptions:
    """The options of `edgefl cloud train-stage`."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 9460
    names: tuple[str, ...] = ()  # more names and addresses at which devices reach it
    threads: int = 0  # of each training process; 0 = one per core
    memory_mb: int = 0  # of each training process; 0 = no limit
    cache_mb: int = 4096  # of all activations that devices with a frozen part have sent
    device_cache_mb: int = 1024
    load_s: float = 300.0  # to start a training process
    run_s: float = 300.0  # to handle one message
    idle_process_s: float = 300.0  # a process without a session ends after so long
    insecure: bool = False
    limits: SplitLimits = field(default_factory=SplitLimits)

    def __post_init__(self) -> None:
        if self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"--insecure is for loopback only, --host is {self.host}; drop --insecure, or use a loopback address"
            )


class SplitServer:
    """One process that trains the cloud's parts of all jobs of a home."""

    def __init__(self, options: SplitServerOptions) -> None:
        self._options = options
        if find_spec("torch") is None:
            raise MissingExtra("training in parts", "train")
        check_home(options.home, "cloud")
        self._tls = options.home / "tls"
        if not (self._tls / "ca.key").exists():
            raise HomeError(f"{options.home} has no CA yet; start its cloud first: `edgefl cloud start`")
        self._exit = contextlib.ExitStack()
        self._shares = Shares.of(raise_limit(), builtin_broker=False)
        engine = open_database(options.home / "cloud.db")
        self._exit.callback(engine.dispose)
        self._enrolment = Enrolment(engine, self._tls)
        key = load_private_key(options.home / "fleet.key").public_key()
        self._jobs = SplitJobs(engine, BlobStore(options.home / "blobs", is_ours=False), key)
        self._processes: dict[str, JobProcess] = {}
        folder = options.home / "stages" / "training"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._identity = Identity(folder / "key.pem", folder / "cert.pem", self._tls / "ca.pem")
        self._renew()

    def serve(self, on_ready: Callable[[str], None] = lambda _address: None) -> None:
        """Serve until SIGTERM or SIGINT; raises ConfigError for a port in use."""
        keep_freed_memory()
        with self._exit:
            asyncio.run(self._serve(on_ready))

    async def _serve(self, on_ready: Callable[[str], None]) -> None:
        options, stop, loop = self._options, asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with self._serve_port():
            event(_log, logging.INFO, "split.ready", port=options.port, home=options.home)
            on_ready(f"{options.host}:{options.port}")
            await stop.wait()
            event(_log, logging.INFO, "split.stopping")
            await asyncio.gather(*(one.stop() for one in self._processes.values()))

    @contextlib.asynccontextmanager
    async def _serve_port(self) -> AsyncIterator[None]:
        options, loop = self._options, asyncio.get_running_loop()
        known = KnownDevices(self._enrolment.is_known, loop.time)
        calls = RunningCalls()
        watches: list[Callable[[], Coroutine[Any, Any, None]]] = [self._keep_certificate, self._look_after_jobs]

        def handlers(port: GrpcPort, workers: ThreadPoolExecutor) -> list[Any]:
            def end(device: str) -> None:
                calls.cut(device, REMOVED)
                port.drop(device)

            watches.append(functools.partial(known.watch, calls.devices, end, workers))
            checks = CallerChecks(
                is_known=known.is_known, was_known=known.was_known, insecure=options.insecure, admit=port.admit,
                pace=port.pace,
            )  # fmt: skip
            service = SplitService(Callers(checks, calls, workers), self._admit, options.limits, port.pace)
            return [split_handler(service, calls.registered)]

        kind = PortKind(option="--port", max_message_bytes=16 * CHUNK_BYTES, pace=MESSAGES)
        identity = None if options.insecure else self._identity
        async with serve_grpc(options.host, options.port, identity, self._shares, handlers, kind):
            with unwrapped():
                async with asyncio.TaskGroup() as group:  # if one fails, which is a bug, the server stops
                    tasks = [group.create_task(watch(), name="split-watch") for watch in watches]
                    try:
                        yield
                    finally:
                        for task in tasks:
                            task.cancel()

    async def _admit(self, device: str, begin: BeginTraining) -> tuple[SessionSpec, JobProcess]:
        """Return a device's session and the process that it is for; raises SessionEnded."""
        try:
            session, training = await asyncio.to_thread(self._jobs.admit, device, begin)
        except SQLAlchemyError as cause:
            raise SessionEnded("UNAVAILABLE", f"the cloud's database is busy: {cause}") from cause
        if training.job not in self._processes:
            self._processes[training.job] = self._process(training)
        return session, self._processes[training.job]

    def _process(self, training: TrainingSpec) -> JobProcess:
        options = self._options
        folder = SplitFolder(options.home.absolute(), training.job)
        folder.work.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings = {
            **dataclasses.asdict(training), "bundle": str(training.bundle), "home": str(options.home.absolute()),
            "memory_mb": options.memory_mb, "threads": options.threads or len(os.sched_getaffinity(0)),
            "cache_bytes": options.cache_mb << 20, "device_cache_bytes": options.device_cache_mb << 20,
        }  # fmt: skip
        return JobProcess(training.job, settings, folder.work, load_s=options.load_s, run_s=options.run_s)

    async def _look_after_jobs(self) -> None:
        """End the processes of jobs that are over or idle, and delete what jobs have left that are over."""
        loop = asyncio.get_running_loop()
        rounds: dict[str, int] = {}
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                unfinished = await asyncio.to_thread(self._jobs.unfinished)
                for job, process in list(self._processes.items()):
                    is_idle = (
                        not process.num_sessions and loop.time() - process.idle_since_s > self._options.idle_process_s
                    )
                    if job not in unfinished or is_idle:
                        del self._processes[job]
                        await process.stop()
                    elif (done := await asyncio.to_thread(self._jobs.rounds_done, job)) != rounds.get(job):
                        rounds[job] = done
                        await process.forget(done + 1)
                for folder in await asyncio.to_thread(folders_of_others, self._options.home, unfinished):
                    await asyncio.to_thread(folder.remove)
            except (SQLAlchemyError, OSError) as error:  # busy, or a full disk: look again
                event(_log, logging.WARNING, "split.not_looked_after", reason=error)

    async def _keep_certificate(self) -> None:
        """Renew the certificate when a third of its lifetime is left; gRPC reads it at the next handshake."""
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                await asyncio.to_thread(self._renew)
            except (EdgeflError, OSError, ValueError) as error:
                event(_log, logging.ERROR, "certificates.not_looked_after", reason=error)

    def _renew(self) -> None:
        options = self._options
        hosts = {options.host, "localhost", "127.0.0.1", socket.gethostname(), *options.names}
        renew_server(self._tls, self._identity, sorted(hosts - {"0.0.0.0", "::"}), CLOUD_NAME)  # noqa: S104 - not bound
