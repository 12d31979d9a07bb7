"""A stage's process: one ONNX model that computes batches in shared memory, one after the other.

    python -P -m cloud.stages.stage_main --control N --memory N --memory-bytes N --path MODEL [--cores 0,1] [...]

A child of the stage server; it ends with it. Its memory is limited, so that a batch that needs too much fails alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cloud.stages.slots import SharedMemory, SlotFull
from cloud.stages.wire import (
    MAX_ERROR_CHARS,
    MAX_PACKET_BYTES,
    BatchDone,
    BatchFailed,
    Message,
    RunBatch,
    StageFailed,
    StageUp,
    described_places,
    packet,
    parse_packet,
)
from edgefl.errors import EdgeflError, ProtocolError
from edgefl.models.made_inputs import candidates
from edgefl.models.session import new_session, run_errors
from edgefl.models.tensors import TensorInfo, described
from edgefl.process.children import die_with_parent, limit_own_memory
from edgefl.trees import Array

# How much a row of a batch may differ from the same row alone, relative to the largest value: kernels for other sizes
# add in another order.
MERGE_TOLERANCE = 1e-3
_NO_MEMORY = ("failed to allocate", "bad_alloc", "out of memory")


class LoadedStage:
    """The session, and what it was found to take."""

    def __init__(self, path: Path, threads: int) -> None:
        self._session = new_session(path, threads=threads)
        who = f"the stage {path.name}"
        self.inputs = described(who, self._session.get_inputs())
        self.outputs = described(who, self._session.get_outputs())
        self.unmerged = self._why_unmerged()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Return all outputs."""
        results: list[Array] = self._session.run(None, dict(feeds))
        return results

    def _why_unmerged(self) -> str:
        """Return why rows of several requests cannot be one batch; empty if they can. It is tried, not believed."""
        fixed = [one for one in (*self.inputs, *self.outputs) if not one.shape or one.shape[0] != -1]
        if fixed:
            return f"{fixed[0]} has no first dimension of any size"
        for feeds in candidates(self.inputs):
            if any(array.shape[0] != 1 for array in feeds.values()):
                continue
            try:
                alone = self.run(feeds)
            except run_errors():
                continue  # this size does not suit the model
            return self._compare(feeds, alone)
        return "it runs on none of the inputs that were made to try it"

    def _compare(self, feeds: Mapping[str, Array], alone: Sequence[Array]) -> str:
        other = {name: _other_row(array) for name, array in feeds.items()}
        try:
            second = self.run(other)
            both = self.run({name: np.concatenate([feeds[name], other[name]]) for name in feeds})
        except run_errors() as error:
            return f"it does not compute two rows: {error}"
        for info, one, two, merged in zip(self.outputs, alone, second, both, strict=True):
            apart = np.concatenate([one, two])
            if merged.shape != apart.shape:
                return f"for two rows {info.name} has shape {list(merged.shape)}, not {list(apart.shape)}"
            wide, expected = merged.astype(np.float64), apart.astype(np.float64)
            scale = max(1e-6, float(np.abs(expected).max(initial=0)))
            if not np.allclose(wide, expected, rtol=0, atol=MERGE_TOLERANCE * scale):
                return f"a row of {info.name} depends on the other rows of its batch"
        return ""


def _other_row(row: Array) -> Array:
    """Return a row of other values; integers may be indices, and stay."""
    return (1 - row).astype(row.dtype) if row.dtype.kind == "f" else row


def serve(control: socket.socket, memory: SharedMemory, stage: LoadedStage) -> None:
    """Compute batches until the server is gone."""
    while data := control.recv(MAX_PACKET_BYTES):
        message = parse_packet(data)
        if not isinstance(message, RunBatch):
            raise ProtocolError(f"unexpected message from the stage server: {message}")
        control.send(packet(compute(message, memory, stage)))


def compute(request: RunBatch, memory: SharedMemory, stage: LoadedStage) -> BatchDone | BatchFailed:
    """Compute one batch."""
    try:
        feeds = {name: memory.read(placed) for name, placed in request.placed().items()}
        results = stage.run(feeds)
        places, free = {}, request.free
        for info, result in zip(stage.outputs, results, strict=True):
            places[info.name], free = memory.write([result], free, request.end)
    except SlotFull as error:
        return BatchFailed(batch=request.batch, error=f"its outputs are too large: {error}", memory=True)
    except run_errors() as error:
        text = (str(error) or type(error).__name__)[:MAX_ERROR_CHARS]
        lacks = isinstance(error, MemoryError) or any(sign in text.lower() for sign in _NO_MEMORY)
        return BatchFailed(batch=request.batch, error=text, memory=lacks)
    return BatchDone(batch=request.batch, tensors=described_places(places), free=free)


def load_stage(path: Path, threads: int) -> tuple[LoadedStage | None, Message]:
    """Load the model; return it with the message that says how that went."""
    faults: tuple[type[Exception], ...] = (EdgeflError, OSError, *run_errors())
    try:
        stage = LoadedStage(path, threads)
    except faults as error:
        return None, StageFailed(error=(str(error) or type(error).__name__)[:MAX_ERROR_CHARS])
    return stage, StageUp(inputs=_infos(stage.inputs), outputs=_infos(stage.outputs), unmerged=stage.unmerged)


def _infos(tensors: Sequence[TensorInfo]) -> list[Any]:
    return [(one.name, one.datatype, one.shape) for one in tensors]


def main() -> None:
    """Run as the stage server's child."""
    parser = argparse.ArgumentParser(prog="edgefl-stage", description="A stage's process.")
    for name in ("control", "memory", "memory-bytes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--cores", default="", help="numbers of the cores to use, separated by commas")
    parser.add_argument("--memory-mb", type=int, default=0, help="memory limit; 0 = none")
    arguments = parser.parse_args()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops its stages
    if arguments.cores:
        os.sched_setaffinity(0, [int(core) for core in arguments.cores.split(",")])
    limit_own_memory(arguments.memory_mb)
    control = socket.socket(fileno=arguments.control)
    memory = SharedMemory(arguments.memory, arguments.memory_bytes)
    stage, message = load_stage(arguments.path, len(os.sched_getaffinity(0)))
    control.send(packet(message))
    if stage is not None:
        serve(control, memory, stage)


if __name__ == "__main__":
    main()
