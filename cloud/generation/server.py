"""The process that serves a language model's tail: beside a cloud, on the same home, with a certificate of its own.

It reads who is enrolled from the cloud's database, and its CA. It does not lock the home: the cloud does.
"""

from __future__ import annotations

import asyncio
import contextlib
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

from cloud.dataplane.callers import CallerChecks, Callers
from cloud.dataplane.grpc_port import GrpcPort, PortPace
from cloud.dataplane.running_calls import RunningCalls
from cloud.generation.service import SequenceService, ServedTail
from cloud.generation.sessions import SessionLimits
from cloud.generation.tail import LanguageTail, TailLimits
from cloud.generation.tail_process import TailSpec
from cloud.servers import PortKind, serve_grpc, unwrapped
from cloud.shares import Shares
from cloud.stages.known_devices import KnownDevices
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from cloud.trust.own_certificates import renew_server
from edgefl.errors import ConfigError, EdgeflError, HomeError, MissingExtra
from edgefl.logs import event
from edgefl.offload.generation.stage_info import read_stage
from edgefl.process.descriptors import raise_limit
from edgefl.process.home import check_home
from edgefl.protocols.addresses import is_loopback
from edgefl.protocols.inference.service import inference_handler
from edgefl.protocols.manifest import check_model_name
from edgefl.protocols.tls import CLOUD_NAME, Identity

CALLS = PortPace(per_s=2000.0, burst=4000.0)  # of a device, and messages of its streams
REMOVED = "this device was removed from the fleet; enrol it again with a new token"
_RENEW_S = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TailOptions:
    """The options of `edgefl cloud generate`."""

    home: Path
    folder: Path  # of the tail
    name: str = ""  # by which clients ask for it; empty = the model's
    host: str = "127.0.0.1"
    port: int = 9460
    names: tuple[str, ...] = ()  # more names and addresses at which devices reach it
    engine: str = "torch"  # torch, torch:DEVICE or numpy
    memory_mb: int = 0  # of the tail's process; 0 = no limit
    cache_mb: int = 1024  # for keys and values
    device_sequences: int = 8
    lease_s: float = 60.0
    load_s: float = 120.0
    run_s: float = 60.0
    max_request_mb: int = 32
    insecure: bool = False
    limits: TailLimits = field(default_factory=TailLimits)

    def __post_init__(self) -> None:
        if self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"--insecure is for loopback only, --host is {self.host}; drop --insecure, or use a loopback address"
            )
        if self.engine.partition(":")[0] not in {"torch", "numpy"}:
            raise ConfigError(f"--engine {self.engine!r} is unknown; expected torch, torch:DEVICE or numpy")


class TailServer:
    """One process that serves one tail."""

    def __init__(self, options: TailOptions) -> None:
        self._options = options
        if options.engine != "numpy" and find_spec("torch") is None:
            raise MissingExtra("the tail of a language model", "offload")
        check_home(options.home, "cloud")
        self._tls = options.home / "tls"
        if not (self._tls / "ca.key").exists():
            raise HomeError(f"{options.home} has no CA yet; start its cloud first: `edgefl cloud start`")
        info = read_stage(options.folder)
        if not info.is_last:
            raise ConfigError(
                f"{options.folder} is {info.what}, which ends before the last block; give the folder `tail` of "
                "`edgefl offload split-decoder`"
            )
        self._served = ServedTail(name=options.name or info.name, info=info)
        check_model_name(self._served.name)
        self._exit = contextlib.ExitStack()
        self._shares = Shares.of(raise_limit(), builtin_broker=False)
        engine = open_database(options.home / "cloud.db")
        self._exit.callback(engine.dispose)
        self._enrolment = Enrolment(engine, self._tls)
        folder = options.home / "stages" / self._served.name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._identity = Identity(folder / "key.pem", folder / "cert.pem", self._tls / "ca.pem")
        self._renew()

    def serve(self, on_ready: Callable[[str], None] = lambda _address: None) -> None:
        """Serve until SIGTERM or SIGINT; raises ConfigError for a tail that cannot be served or a port in use."""
        with self._exit:
            asyncio.run(self._serve(on_ready))

    async def _serve(self, on_ready: Callable[[str], None]) -> None:
        options, stop, loop = self._options, asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        info = self._served.info
        spec = TailSpec(
            folder=options.folder.absolute(), engine=options.engine, cores=tuple(sorted(os.sched_getaffinity(0))),
            memory_mb=options.memory_mb, load_s=options.load_s, run_s=options.run_s,
        )  # fmt: skip
        sessions = SessionLimits(
            context=info.spec.context, token_bytes=max(1, info.cache_bytes), of_device=options.device_sequences,
            cache_bytes=options.cache_mb << 20, lease_s=options.lease_s,
        )  # fmt: skip
        tail = LanguageTail(spec, options.limits, sessions)
        async with tail.running(), self._serve_port(tail):
            event(_log, logging.INFO, "tail.ready", model=self._served.name, blocks=f"{info.start}-{info.end}",
                  port=options.port, pid=tail.pid, digest=info.digest)  # fmt: skip
            on_ready(f"{options.host}:{options.port}")
            await stop.wait()
            event(_log, logging.INFO, "tail.stopping")

    @contextlib.asynccontextmanager
    async def _serve_port(self, tail: LanguageTail) -> AsyncIterator[None]:
        options, loop = self._options, asyncio.get_running_loop()
        known = KnownDevices(self._enrolment.is_known, loop.time)
        calls = RunningCalls()
        watches: list[Callable[[], Coroutine[Any, Any, None]]] = []

        def handlers(port: GrpcPort, workers: ThreadPoolExecutor) -> list[Any]:
            def end(device: str) -> None:
                calls.cut(device, REMOVED)
                port.drop(device)

            watches.append(functools.partial(known.watch, calls.devices, end, workers))
            checks = CallerChecks(
                is_known=known.is_known, was_known=known.was_known, insecure=options.insecure, admit=port.admit,
                pace=port.pace,
            )  # fmt: skip
            service = SequenceService(self._served, tail, Callers(checks, calls, workers), port.pace)
            return [inference_handler(service, calls.registered)]

        kind = PortKind(option="--port", max_message_bytes=options.max_request_mb << 20, pace=CALLS)
        identity = None if options.insecure else self._identity
        async with serve_grpc(options.host, options.port, identity, self._shares, handlers, kind):
            with unwrapped():
                async with asyncio.TaskGroup() as group:  # if one fails, which is a bug, the server stops
                    tasks = [group.create_task(watch(), name="known-devices") for watch in watches]
                    tasks.append(group.create_task(self._keep_certificate(), name="tail-certificate"))
                    try:
                        yield
                    finally:
                        for task in tasks:
                            task.cancel()

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
