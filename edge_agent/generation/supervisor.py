"""The agent's side of text generation: starts the generation process, and starts it again when it ends.

What it generates with is a folder that the agent was started with, or the release of a language model. The agent holds
the socket at which the serving process reaches it, so a request that comes while it starts waits. Another release
takes over when the texts that are generated have ended, or after `DRAIN_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_agent.generation.wire import listen_privately
from edge_agent.releases.model_file import ModelFile
from edge_agent.releases.trial import try_stage
from edgefl.errors import ConfigError, ProtocolError
from edgefl.logs import event
from edgefl.offload.generation.stage_info import CUT_FORMATS
from edgefl.process.children import SHORT_WAITS, Child
from edgefl.protocols.backoff import Backoff

STOP_S = 5.0
DRAIN_S = 30.0  # for texts that are generated when another release takes over
STEADY_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
MAX_DEATHS = 4  # soon after the start, in a row: then the release is reported as failing

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """How to generate texts on this device; raises ConfigError for options that cannot be used."""

    folder: Path  # of a head, or of a whole model
    tail: str = ""  # HOST:PORT of `edgefl cloud generate`; empty = the folder has the whole model
    tail_model: str = ""  # the tail's name there; empty = the model's
    format: str = "fp16"  # of what crosses the cut
    memory_mb: int = 0  # limit; 0 = none

    def __post_init__(self) -> None:
        host, _, port = self.tail.rpartition(":")
        if self.tail and not (host and port.isdecimal()):
            raise ConfigError(f"--generate-tail {self.tail!r} is not of the form HOST:PORT")
        if self.format not in CUT_FORMATS:
            raise ConfigError(
                f"--generate-format {self.format!r} is unknown; expected one of: {', '.join(CUT_FORMATS)}"
            )
        _check_memory(self.memory_mb)
        if not self.folder.is_dir():
            raise ConfigError(
                f"--generate {self.folder} is no folder; `edgefl offload split-decoder` writes folders of stages"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationPlace:
    """Where texts are generated."""

    device: str
    tls_home: Path | None  # with the device's certificate; None = no TLS
    memory_mb: int = 0  # limit for a release, and for its trial; 0 = none
    load_s: float = 60.0  # time limit of a trial

    def __post_init__(self) -> None:
        _check_memory(self.memory_mb)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationCallbacks:
    """Called in the event loop."""

    address: Callable[[str], None] = lambda _: None  # where the process listens; empty = there is no model
    failing: Callable[[ModelFile, str], None] = lambda _model, _reason: None  # this release ends its process repeatedly


class StagedText:
    """The release of a language model that was tried, and is not served yet."""

    def __init__(self, owner: GenerationSupervisor, model: ModelFile) -> None:
        self._owner, self.model = owner, model

    def switch(self) -> None:
        """Generate with this model instead of the one before."""
        self._owner.take_over(self.model)

    def forget(self) -> None:
        """Nothing was loaded."""


class GenerationSupervisor:
    """Supervises the generation process of one agent. Used in its event loop."""

    def __init__(
        self, config: GenerationConfig | None, place: GenerationPlace, callbacks: GenerationCallbacks | None = None
    ) -> None:  # fmt: skip
        """`config` is that of the agent's own options, which no release replaces; None = releases are served."""
        self._config, self._place, self._callbacks = config, place, callbacks or GenerationCallbacks()
        self._is_fixed = config is not None
        self._release: ModelFile | None = None
        self._changed = asyncio.Event()
        self._listener, self._address = listen_privately()
        self.pid: int | None = None

    @property
    def address(self) -> str:
        """Where the process listens; empty = there is no model."""
        return "" if self._config is None else self._address

    def versions(self) -> dict[str, int]:
        """Return the release that texts are generated with, by its name."""
        return {} if self._release is None else {self._release.name: self._release.version}

    async def prepare(self, model: ModelFile, *, trial: bool) -> StagedText:
        """Try the release of a language model in a process of its own; raises ProtocolError."""
        if self._is_fixed:
            raise ProtocolError(
                "this agent was started with --generate, so it serves no release of a language model; start it without"
            )
        if trial:
            await try_stage(
                model.name, model.version, model.folder, tail=model.text_stage().tail,
                memory_mb=self._place.memory_mb, within_s=self._place.load_s,
            )  # fmt: skip
        return StagedText(self, model)

    def take_over(self, model: ModelFile) -> None:
        """See `StagedText.switch`."""
        stage = model.text_stage()
        self._release = model
        self._config = GenerationConfig(
            folder=model.folder, tail=stage.tail, format=stage.form, memory_mb=self._place.memory_mb
        )
        self._changed.set()
        self._callbacks.address(self.address)

    async def run(self) -> None:
        """Keep the process running, while there is a model, until cancelled."""
        loop, pauses, deaths = asyncio.get_running_loop(), Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S), 0
        try:
            while True:
                if self._config is None:
                    await self._changed.wait()
                    continue
                self._changed.clear()
                begun_s = loop.time()
                try:
                    await self._run_child(self._config)
                except OSError as error:  # no process, no descriptor
                    event(_log, logging.ERROR, "generation.not_started", reason=error)
                if self._changed.is_set():
                    pauses.reset()
                    deaths = 0
                    continue
                if loop.time() - begun_s > STEADY_S:
                    pauses.reset()
                    deaths = 0
                deaths += 1
                if deaths == MAX_DEATHS and self._release is not None:
                    reason = f"the generation process ended {deaths} times within {STEADY_S:g} s of its start"
                    self._callbacks.failing(self._release, reason)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pauses.next_s()):
                        await self._changed.wait()
        finally:
            self._listener.close()

    async def _run_child(self, config: GenerationConfig) -> None:
        """Run one process to its end, or until another release takes over."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                child = self._start(config, theirs.fileno())
            self.pid = child.pid
            ended, changed = loop.create_task(child.ended.wait()), loop.create_task(self._changed.wait())
            try:
                await asyncio.wait((ended, changed), return_when=asyncio.FIRST_COMPLETED)
                if not child.ended.is_set():
                    await asyncio.shield(asyncio.create_task(_stop(child, DRAIN_S)))
                    return
            except asyncio.CancelledError:
                await asyncio.shield(asyncio.create_task(_stop(child, STOP_S)))
                raise
            finally:
                ended.cancel()
                changed.cancel()
                self.pid = None
        event(_log, logging.ERROR, "generation.ended", pid=child.pid, how=child.end)

    def _start(self, config: GenerationConfig, control: int) -> Child:
        place = self._place
        options = (
            f"--listen={self._listener.fileno()}", f"--control={control}", f"--folder={config.folder.absolute()}",
            f"--tail={config.tail}", f"--tail-model={config.tail_model}", f"--format={config.format}",
            f"--home={place.tls_home or ''}", f"--device={place.device}", f"--memory-mb={config.memory_mb}",
            f"--log-level={logging.getLogger().getEffectiveLevel()}",
        )  # fmt: skip
        descriptors = (self._listener.fileno(), control)
        return Child(
            "edge_agent.generation.generation_main", *options, descriptors=descriptors, environment=SHORT_WAITS
        )  # fmt: skip


def _check_memory(limit_mb: int) -> None:
    if limit_mb < 0:
        raise ConfigError(f"--generate-memory-mb {limit_mb} must be 0 (no limit) or more")


async def _stop(child: Child, within_s: float) -> None:
    try:
        await child.stop(within_s)
    except TimeoutError:  # it was killed
        event(_log, logging.WARNING, "generation.killed", pid=child.pid)
