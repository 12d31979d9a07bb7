"""One stage as the server sees it: a process that is started, given batches, and started again when it ends.

A stage's process computes its batches in their order. A run that takes longer than its limit ends the process: a
kernel cannot be interrupted otherwise. Invariant: each batch that was sent gets one call of `done`, `failed` or
`lost`, whatever becomes of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cloud.beside.restarted import STOPPED, RestartedProcess
from cloud.stages import wire
from cloud.stages.slots import Placed, Slots
from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.models.tensors import TensorInfo
from edgefl.process.children import Child

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """One stage: its model file and what it may use."""

    path: Path
    cores: tuple[int, ...] = ()  # numbers of CPU cores; empty = those of the server
    memory_mb: int = 0  # limit; 0 = none
    load_s: float = 120.0  # time limit to start and load the model
    run_s: float = 60.0  # time limit for one batch


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFacts:
    """What a loaded stage takes and returns."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    unmerged: str  # why rows of several requests cannot be one batch; empty if they can


class BatchCallbacks(Protocol):
    """What hears of the batches that a stage was given."""

    def done(self, stage: StageProcess, batch: int, tensors: Mapping[str, Placed], free: int) -> None: ...

    def failed(self, stage: StageProcess, batch: int, error: str, *, memory: bool) -> None: ...

    def changed(self, stage: StageProcess, lost: list[int], reason: str) -> None: ...


class StageProcess(RestartedProcess[StageFacts]):
    """Starts and feeds the process of one stage. Used in the event loop only."""

    def __init__(self, number: int, spec: StageSpec, memory: Slots, callbacks: BatchCallbacks) -> None:
        super().__init__()
        self.number, self._spec, self._memory, self._callbacks = number, spec, memory, callbacks
        self.facts: StageFacts | None = None  # of the loaded model
        self._control: socket.socket | None = None
        self._running: dict[int, asyncio.TimerHandle | None] = {}  # batches, the oldest first
        self._load_limit: asyncio.TimerHandle | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    def send(self, batch: int, tensors: Mapping[str, Placed], free: int, end: int) -> None:
        """Have a batch computed. The process must be up."""
        if self._control is None:
            raise RuntimeError(f"stage {self.number} is not up")
        message = wire.RunBatch(batch=batch, tensors=wire.described_places(tensors), free=free, end=end)
        self._running[batch] = None
        if len(self._running) == 1:
            self._limit_oldest()
        with contextlib.suppress(OSError):  # it has ended: `_run_child` sees that, and reports the batch as lost
            self._control.send(wire.packet(message))

    async def _run_child(self) -> None:
        """Run one process to its end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        loop = asyncio.get_running_loop()
        with ours:
            with theirs:
                child = self._start(theirs.fileno())
            ours.setblocking(False)  # noqa: FBT003 - its only parameter has no name
            self._begin(child)
            self._control = ours
            loop.add_reader(ours, self._read)
            overdue = loop.call_later(
                self._spec.load_s, self._kill, f"the model was not loaded in {self._spec.load_s:g} s"
            )
            self._load_limit = overdue
            try:
                await self._ended(child)
                self._read()  # what it said before it ended
            finally:
                overdue.cancel()
                loop.remove_reader(ours)
                self._control = self._child = None
                self._note_down(self._why_ended(child))

    def _start(self, control: int) -> Child:
        spec = self._spec
        options = [f"--control={control}", f"--memory={self._memory.descriptor}", f"--path={spec.path}"]
        options += [f"--memory-bytes={self._memory.num_bytes}", f"--memory-mb={spec.memory_mb}"]
        options += [f"--cores={','.join(map(str, spec.cores))}"]
        return Child("cloud.stages.stage_main", *options, descriptors=(control, self._memory.descriptor))

    def _read(self) -> None:
        while self._control is not None:
            try:
                data = self._control.recv(wire.MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                asyncio.get_running_loop().remove_reader(self._control)
                return
            self._handle(wire.parse_packet(data))

    def _handle(self, message: wire.Message) -> None:
        match message:
            case wire.StageUp():
                self._note_up(message)
            case wire.StageFailed():
                self._killed_for = f"its model cannot be loaded: {message.error}"
            case wire.BatchDone():
                if self._settle(message.batch):
                    self._callbacks.done(self, message.batch, message.placed(), message.free)
            case wire.BatchFailed():
                if self._settle(message.batch):
                    self._callbacks.failed(self, message.batch, message.error, memory=message.memory)
            case _:
                raise ProtocolError(f"unexpected message from stage {self.number}: {message}")

    def _note_up(self, message: wire.StageUp) -> None:
        if self._load_limit is not None:
            self._load_limit.cancel()
        self.facts = StageFacts(
            inputs=_infos(message.inputs), outputs=_infos(message.outputs), unmerged=message.unmerged
        )
        self.is_up, self.reason = True, ""
        event(_log, logging.INFO, "stage.up", stage=self.number, pid=self.pid, cores=list(self._spec.cores) or "-",
              merges=message.unmerged or "yes")  # fmt: skip
        if not self.first_load.done():
            self.first_load.set_result(self.facts)
        self._callbacks.changed(self, [], "")

    def _note_down(self, reason: str) -> None:
        lost = list(self._running)
        for batch in lost:
            self._settle(batch)
        self.is_up, self.reason = False, reason
        level = logging.INFO if reason == STOPPED else logging.ERROR
        event(_log, level, "stage.ended", stage=self.number, pid=self.pid, reason=reason, lost=len(lost))
        if not self.first_load.done():
            self.first_load.set_exception(ProtocolError(f"stage {self.number} does not start: {reason}"))
        self._callbacks.changed(self, lost, reason)

    def _settle(self, batch: int) -> bool:
        if batch not in self._running:
            return False
        timer = self._running.pop(batch)
        if timer is not None:
            timer.cancel()
        self._limit_oldest()
        return True

    def _limit_oldest(self) -> None:
        """Begin the time limit of the batch that is computed now."""
        oldest = next(iter(self._running), None)
        if oldest is not None and self._running[oldest] is None:
            limit_s = self._spec.run_s
            reason = f"a batch took longer than {limit_s:g} s"
            self._running[oldest] = asyncio.get_running_loop().call_later(limit_s, self._kill, reason)


def _infos(described: list[list[object]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(str(name), str(datatype), tuple(shape)) for name, datatype, shape in described)  # type: ignore[arg-type]
