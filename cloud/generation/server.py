"""The process that serves a language model's tail: beside a cloud, on the same home, with a certificate of its own.

It reads who is enrolled from the cloud's database, and its CA. It does not lock the home: the cloud does.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cloud.beside.beside_cloud import BesideCloud, refuse_insecure
from cloud.dataplane.callers import Callers
from cloud.dataplane.grpc_port import GrpcPort, PortPace
from cloud.dataplane.running_calls import RunningCalls
from cloud.generation.joined_tail import JoinedTail
from cloud.generation.service import SequenceService, ServedTail
from cloud.generation.sessions import SessionLimits
from cloud.generation.tail import LanguageTail, TailLimits
from cloud.generation.tail_process import TailProcess, TailSpec
from cloud.servers import PortKind
from edgefl.errors import ConfigError, MissingExtra
from edgefl.logs import event
from edgefl.offload.generation.stage_info import read_stage
from edgefl.protocols.inference.service import inference_handler
from edgefl.protocols.manifest import check_model_name

CALLS = PortPace(per_s=2000.0, burst=4000.0)  # of a device, and messages of its streams

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
    engine: str = "auto"  # auto, torch, torch:DEVICE or numpy
    join: Path | None = None  # socket at which torchrun's first process connects; None = a process of our own
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
        refuse_insecure(self.host, insecure=self.insecure)
        if self.engine.partition(":")[0] not in {"auto", "torch", "numpy"}:
            raise ConfigError(f"--engine {self.engine!r} is unknown; expected auto, torch, torch:DEVICE or numpy")
        if self.join is not None and (self.engine != "auto" or self.memory_mb):
            raise ConfigError("--engine and --memory-mb are for a process of the server's own; with --join, torchrun's "
                              "processes have their own options")  # fmt: skip


class TailServer:
    """One process that serves one tail."""

    def __init__(self, options: TailOptions) -> None:
        self._options = options
        if options.engine.startswith("torch") and find_spec("torch") is None:
            raise MissingExtra("the tail of a language model", "offload")
        self._beside = BesideCloud(
            options.home, options.host, options.port, names=options.names, insecure=options.insecure
        )
        info = read_stage(options.folder)
        if not info.is_last:
            raise ConfigError(
                f"{options.folder} is {info.what}, which ends before the last block; give the folder `tail` of "
                "`edgefl offload split-decoder`"
            )
        self._served = ServedTail(name=options.name or info.name, info=info)
        check_model_name(self._served.name)
        self._identity = self._beside.certified(self._served.name)

    def serve(self, on_ready: Callable[[str], None] = lambda _address: None) -> None:
        """Serve until SIGTERM or SIGINT; raises ConfigError for a tail that cannot be served or a port in use."""
        self._beside.run(lambda stop: self._serve(stop, on_ready))

    async def _serve(self, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
        options = self._options
        info = self._served.info
        spec = TailSpec(
            folder=options.folder.absolute(), digest=info.digest, engine=options.engine,
            cores=tuple(sorted(os.sched_getaffinity(0))), memory_mb=options.memory_mb, load_s=options.load_s,
            run_s=options.run_s,
        )  # fmt: skip
        sessions = SessionLimits(
            context=info.spec.context, token_bytes=max(1, info.cache_bytes), of_device=options.device_sequences,
            cache_bytes=options.cache_mb << 20, lease_s=options.lease_s,
        )  # fmt: skip
        make = TailProcess if options.join is None else functools.partial(JoinedTail, options.join)
        tail = LanguageTail(spec, options.limits, sessions, make)

        def handler(callers: Callers, calls: RunningCalls, port: GrpcPort) -> Any:
            return inference_handler(SequenceService(self._served, tail, callers, port.pace), calls.registered)

        kind = PortKind(option="--port", max_message_bytes=options.max_request_mb << 20, pace=CALLS)
        async with tail.running(), self._beside.serving(self._identity, handler, kind):
            event(_log, logging.INFO, "tail.ready", model=self._served.name, blocks=f"{info.start}-{info.end}",
                  port=options.port, pid=tail.pid, digest=info.digest)  # fmt: skip
            on_ready(self._beside.address)
            await stop.wait()
            event(_log, logging.INFO, "tail.stopping")
