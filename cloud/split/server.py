"""The split training's server: a process beside the cloud, on the same home, with a port and a certificate of its own.

It reads the cloud's database (who is enrolled, which rounds are open) and writes below HOME/split only. It does not
lock the home: the cloud does, and both run at the same time. Each job has a training process of its own, which runs the
task's code; the server itself never does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from cloud.beside.beside_cloud import BesideCloud, refuse_insecure
from cloud.dataplane.callers import Callers
from cloud.dataplane.grpc_port import GrpcPort, PortPace
from cloud.dataplane.running_calls import RunningCalls
from cloud.servers import PortKind
from cloud.split.jobs import SplitJobs, TrainingSpec
from cloud.split.process import JobProcess, SessionEnded
from cloud.split.records import SessionSpec
from cloud.split.results import SplitFolder, folders_of_others
from cloud.split.service import CHUNK_BYTES, SplitLimits, SplitService, split_handler
from cloud.state.blobs import BlobStore
from edgefl.errors import MissingExtra
from edgefl.logs import event
from edgefl.protocols.manifest import load_private_key
from edgefl.protocols.split.messages import BeginTraining

MESSAGES = PortPace(per_s=4000.0, burst=8000.0)  # of a device: chunks of its stream
_LOOK_S = 2.0  # after jobs that have ended

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitServerOptions:
    """The options of `edgefl cloud train-stage`."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 9470
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
        refuse_insecure(self.host, insecure=self.insecure)


class SplitServer:
    """One process that trains the cloud's parts of all jobs of a home."""

    def __init__(self, options: SplitServerOptions) -> None:
        self._options = options
        if find_spec("torch") is None:
            raise MissingExtra("training in parts", "train")
        self._beside = BesideCloud(
            options.home, options.host, options.port, names=options.names, insecure=options.insecure
        )
        key = load_private_key(options.home / "fleet.key").public_key()
        self._jobs = SplitJobs(self._beside.engine, BlobStore(options.home / "blobs", is_ours=False), key)
        self._processes: dict[str, JobProcess] = {}
        self._identity = self._beside.certified("training")

    def serve(self, on_ready: Callable[[str], None] = lambda _address: None) -> None:
        """Serve until SIGTERM or SIGINT; raises ConfigError for a port in use."""
        self._beside.run(lambda stop: self._serve(stop, on_ready))

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
        options = self._options

        def handler(callers: Callers, calls: RunningCalls, port: GrpcPort) -> Any:
            return split_handler(SplitService(callers, self._admit, options.limits, port.pace), calls.registered)

        kind = PortKind(option="--port", max_message_bytes=16 * CHUNK_BYTES, pace=MESSAGES)
        async with self._beside.serving(self._identity, handler, kind, [self._look_after_jobs]):
            event(_log, logging.INFO, "split.ready", port=options.port, home=options.home)
            on_ready(self._beside.address)
            await stop.wait()
            event(_log, logging.INFO, "split.stopping")
            await asyncio.gather(*(one.stop() for one in self._processes.values()))

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
