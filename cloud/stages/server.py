"""The stage server's process: beside a cloud, on the same home, with a port and a certificate of its own.

It reads the cloud's database (who is enrolled, which releases there are) and its CA. It does not lock the home: the
cloud does, and both run at the same time.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cloud.beside.beside_cloud import BesideCloud, refuse_insecure
from cloud.dataplane.callers import Callers
from cloud.dataplane.grpc_port import GrpcPort, PortPace
from cloud.dataplane.running_calls import RunningCalls
from cloud.servers import PortKind
from cloud.stages.pipeline import Pipeline, PipelineLimits
from cloud.stages.service import ServedModel, StageService
from cloud.stages.stage_process import StageSpec
from cloud.state.blobs import BlobStore
from cloud.state.registry import Registry
from edgefl.errors import ConfigError, MissingExtra
from edgefl.logs import event
from edgefl.offload.graph import read_graph
from edgefl.offload.stages import write_stages
from edgefl.protocols.inference.placement import CLOUD
from edgefl.protocols.inference.service import inference_handler, tail_name
from edgefl.protocols.manifest import check_model_name, load_private_key

CALLS = PortPace(per_s=2000.0, burst=4000.0)  # of a device, and messages of its streams

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
        refuse_insecure(self.host, insecure=self.insecure)


class StageServer:
    """One process that serves the stages of one model."""

    def __init__(self, options: StageOptions) -> None:
        self._options = options
        if find_spec("onnxruntime") is None:
            raise MissingExtra("serving the stages of a model", "stages")
        self._beside = BesideCloud(
            options.home, options.host, options.port, names=options.names, insecure=options.insecure
        )
        self._begins: tuple[int, ...] = ()  # layers on devices, of a release that says so
        self._path, self._model = self._find_model(self._beside.engine)
        self._outputs: tuple[str, ...] = ()  # empty = all of the last stage
        self._identity = self._beside.certified(self._model.name)

    def serve(self, on_ready: Callable[[str], None] = lambda _address: None) -> None:
        """Serve until SIGTERM or SIGINT; raises ConfigError for a model that cannot be served or a port in use."""
        self._beside.run(lambda stop: self._serve(stop, on_ready))

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
        options = self._options
        with tempfile.TemporaryDirectory(prefix="edgefl-stages-") as folder:
            specs = await asyncio.to_thread(self._specs, Path(folder))
            pipeline = Pipeline(
                self._model.name, specs, options.limits, entries=sorted({*self._model.entries.values()}),
                outputs=self._outputs,
            )  # fmt: skip

            def handler(callers: Callers, calls: RunningCalls, port: GrpcPort) -> Any:
                return inference_handler(StageService(self._model, pipeline, callers, port.pace), calls.registered)

            kind = PortKind(option="--port", max_message_bytes=options.max_request_mb << 20, pace=CALLS)
            async with pipeline.running(), self._beside.serving(self._identity, handler, kind):
                event(_log, logging.INFO, "stages.ready", model=self._model.name, version=self._model.version,
                      port=options.port, stages=len(pipeline.pids), digest=self._model.digest)  # fmt: skip
                on_ready(self._beside.address)
                await stop.wait()
                event(_log, logging.INFO, "stages.stopping")

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
