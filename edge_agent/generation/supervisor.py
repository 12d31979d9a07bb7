"""The agent's side of text generation: starts the generation process, and starts it again when it ends.

The agent holds the socket at which the serving process reaches it, so a request that comes while it starts waits.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from edge_agent.generation.wire import listen_privately
from edgefl.errors import ConfigError
from edgefl.logs import event
from edgefl.offload.generation.stage_info import CUT_FORMATS
from edgefl.process.children import Child
from edgefl.protocols.backoff import Backoff

STOP_S = 5.0
STEADY_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0

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
        if self.memory_mb < 0:
            raise ConfigError(f"--generate-memory-mb {self.memory_mb} must be 0 (no limit) or more")
        if not self.folder.is_dir():
            raise ConfigError(
                f"--generate {self.folder} is no folder; `edgefl offload split-decoder` writes folders of stages"
            )


class GenerationSupervisor:
    """Supervises the generation process of one agent. Used in its event loop."""

    def __init__(self, config: GenerationConfig, *, device: str, tls_home: Path | None) -> None:
        self._config, self._device, self._tls_home = config, device, tls_home
        self._listener, self.address = listen_privately()
        self.pid: int | None = None

    async def run(self) -> None:
        """Keep the process running until cancelled."""
        loop, pauses = asyncio.get_running_loop(), Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        try:
            while True:
                begun_s = loop.time()
                try:
                    await self._run_child()
                except OSError as error:  # no process, no descriptor
                    event(_log, logging.ERROR, "generation.not_started", reason=error)
                if loop.time() - begun_s > STEADY_S:
                    pauses.reset()
                await asyncio.sleep(pauses.next_s())
        finally:
            self._listener.close()

    async def _run_child(self) -> None:
        """Run one process to its end."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                child = self._start(theirs.fileno())
            self.pid = child.pid
            try:
                await child.ended.wait()
            except asyncio.CancelledError:
                await asyncio.shield(asyncio.create_task(_stop(child)))
                raise
            finally:
                self.pid = None
        event(_log, logging.ERROR, "generation.ended", pid=child.pid, how=child.end)

    def _start(self, control: int) -> Child:
        config = self._config
        options = (
            f"--listen={self._listener.fileno()}", f"--control={control}", f"--folder={config.folder.absolute()}",
            f"--tail={config.tail}", f"--tail-model={config.tail_model}", f"--format={config.format}",
            f"--home={self._tls_home or ''}", f"--device={self._device}", f"--memory-mb={config.memory_mb}",
            f"--log-level={logging.getLogger().getEffectiveLevel()}",
        )  # fmt: skip
        descriptors = (self._listener.fileno(), control)
        return Child("edge_agent.generation.generation_main", *options, descriptors=descriptors)


async def _stop(child: Child) -> None:
    try:
        await child.stop(STOP_S)
    except TimeoutError:  # it was killed
        event(_log, logging.WARNING, "generation.killed", pid=child.pid)
