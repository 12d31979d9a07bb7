"""The stage server's process: beside a cloud, on the same home, with a port and a certificate of its own.

It reads the cloud's database (who is enrolled, which releases there are) and its CA. It does not lock the home: the
cloud does, and both run at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import logging
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cloud.aggregator import keep_freed_memory
from cloud.dataplane.callers import CallerChecks, Callers
from cloud.dataplane.grpc_port import GrpcPort, PortPace
from cloud.dataplane.running_calls import RunningCalls
from cloud.servers import PortKind, serve_grpc, unwrapped
from cloud.shares import Shares
from cloud.stages.known_devices import KnownDevices
from cloud.stages.pipeline import Pipeline, PipelineLimits
from cloud.stages.service import ServedModel, StageService
from cloud.stages.stage_process import StageSpec
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import Enrolment
from cloud.state.registry import Registry
from cloud.state.store import open_database
from cloud.trust.own_certificates import renew_server
from edgefl.errors import ConfigError, EdgeflError, HomeError, MissingExtra
from edgefl.logs import event
from edgefl.offload.graph import read_graph
from edgefl.offload.stages import write_stages
from edgefl.process.descriptors import raise_limit
from edgefl.process.home import check_home
from edgefl.protocols.addresses import is_loopback
from edgefl.protocols.inference.placement import CLOUD
from edgefl.protocols.inference.service import inference_handler, tail_name
from edgefl.protocols.manifest import check_model_name, load_private_key
from edgefl.protocols.tls import CLOUD_NAME, Identity

CALLS = PortPace(per_s=2000.0, burst=4000.0)  # of a device, and messages of its streams
REMOVED = "this device was removed from the fleet; enrol it again with a new token"
_RENEW_S = 3600.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOptions:
    """The options of `edgefl cloud stages`."""

    home: Path
    model: str  # path of an .onnx file, or NAME or NAME:VERSION of a release
    name: str = ""  # by which clients ask for it; empty = the release's, or the file's
    tail_from: tuple[str, ...] = ()  # cuts at which devices' parts end; empty = the whole model
    cuts: tuple[str, ...] = ()  # between the stages
    host: str = "127.0.0.1"
    port: int = 9450
    names: tuple[str, ...] = ()  # more names and addresses at which devices reach it
    cores: tuple[tuple[int, ...], ...] = ()  # of each stage; empty = divided evenly
    memory_mb: int = 0  # of each stage; 0 = no limit
    load_s: float = 120.0
    run_s: float = 60.0
    max_request_mb: int = 32
    accept_nan: bool = False
    insecure: bool = False
    limits: PipelineLimits = field(default_factory=PipelineLimits)

    def __post_init__(self) -> None:
        if self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"--insecure is for loopback only, --host is {self.host}; drop --insecure, or use a loopback address"
            )


class StageServer:
    """One process that serves the stages of one model."""

    def __init__(self, options: StageOptions) -> None:
        self._options = options
        if find_spec("onnxruntime") is None:
            raise MissingExtra("serving the stages of a model", "stages")
        check_home(options.home, "cloud")
        self._tls = options.home / "tls"
        if not (self._tls / "ca.key").exists():
            raise HomeError(f"{options.home} has no CA yet; start its cloud first: `edgefl cloud start`")
        self._exit = contextlib.ExitStack()
        self._shares = Shares.of(raise_limit(), builtin_broker=False)
        engine = open_database(options.home / "cloud.db")
        self._exit.callback(engine.dispose)
        self._enrolment = Enrolment(engine, self._tls)
        self._begins: tuple[int, ...] = ()  # layers on devices, of a release that says so
        self._path, self._model = self._find_model(engine)
        self._outputs: tuple[str, ...] = ()  # empty = all of the last stage
        folder = options.home / "stages" / self._model.name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._identity = Identity(folder / "key.pem", folder / "cert.pem", self._tls / "ca.pem")
        self._renew()

    def serve(self, on_ready: Callable[[str], None] = lambda _address: None) -> None:
        """Serve until SIGTERM or SIGINT; raises ConfigError for a model that cannot be served or a port in use."""
        keep_freed_memory()
        with self._exit:
            asyncio.run(self._serve(on_ready))

    async def _serve(self, on_ready: Callable[[str], None]) -> None:
        options, stop, loop = self._options, asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        with tempfile.TemporaryDirectory(prefix="edgefl-stages-") as folder:
            specs = await asyncio.to_thread(self._specs, Path(folder))
            pipeline = Pipeline(
                self._model.name, specs, options.limits, entries=sorted({*self._model.entries.values()}),
                outputs=self._outputs,
            )  # fmt: skip
            async with pipeline.running(), self._serve_port(pipeline):
                event(_log, logging.INFO, "stages.ready", model=self._model.name, version=self._model.version,
                      port=options.port, stages=len(pipeline.pids), digest=self._model.digest)  # fmt: skip
                on_ready(f"{options.host}:{options.port}")
                await stop.wait()
                event(_log, logging.INFO, "stages.stopping")

    @contextlib.asynccontextmanager
    async def _serve_port(self, pipeline: Pipeline) -> AsyncIterator[None]:
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
            service = StageService(self._model, pipeline, Callers(checks, calls, workers), port.pace)
            return [inference_handler(service, calls.registered)]

        kind = PortKind(option="--port", max_message_bytes=options.max_request_mb << 20, pace=CALLS)
        identity = None if options.insecure else self._identity
        async with serve_grpc(options.host, options.port, identity, self._shares, handlers, kind):
            with unwrapped():
                async with asyncio.TaskGroup() as group:  # if one fails, which is a bug, the server stops
                    tasks = [group.create_task(watch(), name="known-devices") for watch in watches]
                    tasks.append(group.create_task(self._keep_certificate(), name="stage-certificate"))
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

    def _find_model(self, engine: Any) -> tuple[Path, ServedModel]:
        """Return the file of the model, and how clients name it; raises ConfigError, NotFound, BlobDamaged."""
        options, path = self._options, Path(self._options.model)
        if path.suffix == ".onnx" or path.exists():
            if not path.is_file():
                raise ConfigError(f"there is no file {path}; name an .onnx file, or a release as NAME or NAME:VERSION")
            name, version, digest = options.name or path.stem, "1", _sha256_of(path)
        else:
            asked, _, number = options.model.partition(":")
            if number and not number.isdecimal():
                raise ConfigError(
                    f"{options.model!r} names no release; expected NAME or NAME:VERSION, such as digits:3"
                )
            blobs = BlobStore(options.home / "blobs", is_ours=False)
            registry = Registry(engine, blobs, load_private_key(options.home / "fleet.key"))
            release = registry.release(asked, int(number) if number else None)
            blobs.check(release.blob.sha256)
            path, name = blobs.path(release.blob.sha256), options.name or release.model
            version, digest = str(release.version), release.blob.sha256
            if release.offload is not None and not options.tail_from:
                self._begins = tuple(one.layers for one in release.offload.placements if one.form)
        check_model_name(name)
        served = ServedModel(
            name=name, version=version, digest=digest, entries={name: 0}, refuses_nan=not options.accept_nan
        )
        return path.absolute(), served

    def _specs(self, folder: Path) -> list[StageSpec]:
        """Write the stages, and note which of them each of the model's names stands for."""
        options, paths = self._options, [self._path]
        if options.cuts or options.tail_from or self._begins:
            graph = read_graph(self._path)
            begins = (
                [0 if one == CLOUD else graph.position_of(one) for one in options.tail_from] or [*self._begins] or [0]
            )
            positions = sorted({*begins, *(graph.position_of(one) for one in options.cuts)})
            if (first := min(begins)) > positions[0]:
                raise ConfigError(
                    f"--cuts: {self._path.name} is cut before the tail begins, at layer {positions[0]} of {first}; "
                    "name cuts behind --tail-from"
                )
            paths = write_stages(graph, [*positions, len(graph.layers)], folder)
            known = set(graph.head_outputs(min(begins)))
            self._outputs = tuple(one for one in graph.outputs if one not in known)  # that a head does not make
            self._model = replace(self._model, entries=_entries(self._model.name, begins, positions))
        if options.cores and len(options.cores) != len(paths):
            raise ConfigError(
                f"--cores is given {len(options.cores)} times for {len(paths)} stages; give it once for each"
            )
        cores = options.cores or divided_cores(sorted(os.sched_getaffinity(0)), len(paths))
        return [
            StageSpec(path=path, cores=some, memory_mb=options.memory_mb, load_s=options.load_s, run_s=options.run_s)
            for path, some in zip(paths, cores, strict=True)
        ]


def _entries(name: str, begins: Sequence[int], positions: Sequence[int]) -> dict[str, int]:
    """Return the stage for each name that clients may use: the model's own is the first tail's."""
    return {name: positions.index(begins[0])} | {tail_name(name, at): positions.index(at) for at in begins}


def divided_cores(cores: Sequence[int], num_stages: int) -> list[tuple[int, ...]]:
    """Return consecutive cores for each stage, as evenly as possible; all of them for each if there are too few."""
    if len(cores) < num_stages:
        return [tuple(cores)] * num_stages
    bounds = [len(cores) * number // num_stages for number in range(num_stages + 1)]
    return [tuple(cores[first:last]) for first, last in itertools.pairwise(bounds)]


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()
