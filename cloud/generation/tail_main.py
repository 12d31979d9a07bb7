"""A tail's process: the last blocks of a language model, with the keys and values of all its sequences.

    python -P -m cloud.generation.tail_main --control N --folder DIR [--engine auto] [--cores 0,1] [--memory-mb N]

A child of the stage server; it ends with it. It computes one step after the other; what to compute is the server's
decision. A sequence that it does not know, or knows with another length, is an error of that sequence alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cloud.generation.wire import (
    HEAD,
    MAX_ERROR_CHARS,
    Message,
    RunStep,
    StepDone,
    StepItem,
    TailNotLoaded,
    TailUp,
    packed,
    parse_header,
    sizes_of,
)
from edgefl.errors import EdgeflError, ProtocolError, out_of_memory
from edgefl.offload.generation.blocks import ArrayLibrary, DecoderPart, Rows, SequenceCache, numpy_engine, torch_engine
from edgefl.offload.generation.generate import load_part
from edgefl.offload.generation.sampling import Sampling, choose
from edgefl.process.children import die_with_parent, limit_own_memory
from edgefl.protocols.inference.tensors import dtype_of
from edgefl.trees import Array

_TRIED = StepItem(key=0, num=1, datatype="FP32", position=0, room=1, wants_token=True)  # once, when the stage is loaded

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA's and AMD's drivers


class Tail:
    """The stage, and the caches of its sequences by their keys."""

    def __init__(self, part: DecoderPart) -> None:
        self._part = part
        self._caches: dict[int, SequenceCache] = {}

    def step(self, request: RunStep, body: bytes) -> StepDone:
        """Compute a step; what fails is told by item."""
        begun_s = time.perf_counter()
        for key in request.drop:
            self._caches.pop(key, None)
        items = request.items
        errors = [self._why_not(one) for one in items]
        tokens: list[int | None] = [None] * len(items)
        lacks_memory = False
        chosen = [number for number, error in enumerate(errors) if not error]
        if chosen:
            hidden = _hidden(items, body)
            try:
                self._compute(items, chosen, [hidden[number] for number in chosen], tokens, errors)
            except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError for too little memory
                lacks_memory = out_of_memory(error)
                if not lacks_memory:
                    raise
                for number in chosen:  # the caches' lengths did not change
                    errors[number] = str(error)[:MAX_ERROR_CHARS] or "out of memory"
        return StepDone(
            step=request.step, tokens=tokens, errors=errors, lacks_memory=lacks_memory,
            seconds=time.perf_counter() - begun_s,
        )  # fmt: skip

    def _why_not(self, item: StepItem) -> str:
        if item.position == 0:
            # All at once, as it is reserved: memory that is not written yet is not taken from the system.
            self._caches[item.key] = self._part.new_cache(item.room)
        cache = self._caches.get(item.key)
        if cache is None or cache.length != item.position:
            return f"the cache has {0 if cache is None else cache.length} tokens, expected {item.position}"
        return ""

    def _compute(
        self,
        items: Sequence[StepItem],
        chosen: list[int],
        hidden: list[Array],
        tokens: list[int | None],
        errors: list[str],
    ) -> None:
        part, rows = self._part, [Rows(self._caches[items[number].key], items[number].num) for number in chosen]
        joined = part.engine.array(hidden[0] if len(hidden) == 1 else np.concatenate(hidden))
        made = part.run(joined, rows)
        ends = np.cumsum([one.num for one in rows]) - 1
        wanted = [at for at, number in enumerate(chosen) if items[number].wants_token]
        if not wanted:
            return
        logits = part.logits(made[part.engine.array(ends[wanted])])
        for at, row in zip(wanted, logits, strict=True):
            item = items[chosen[at]]
            sampling = Sampling(temperature=item.temperature, top_p=item.top_p, seed=item.seed)
            try:
                tokens[chosen[at]] = choose(row, sampling, item.position + item.num)
            except ProtocolError as error:
                errors[chosen[at]] = str(error)


def _hidden(items: Sequence[StepItem], body: bytes) -> list[Array]:
    """Return the items' hidden states (T, E) in float32."""
    arrays, at = [], 0
    total = sum(one.num * dtype_of(one.datatype).itemsize for one in items)
    width = len(body) // max(1, total)
    for item in items:
        dtype = dtype_of(item.datatype)
        values = np.frombuffer(body, dtype, item.num * width, at)
        at += values.nbytes
        arrays.append(values.reshape(item.num, width).astype(np.float32))
    return arrays


def serve(control: socket.socket, tail: Tail, idle: Callable[[], object] = lambda: None, idle_s: float = 0.0) -> None:
    """Compute steps until the server is gone; call `idle` whenever it says nothing for `idle_s`; 0 = never."""
    while True:
        while idle_s and not select.select([control], [], [], idle_s)[0]:
            idle()
        head = _exactly(control, HEAD.size)
        if not head:
            return
        header, body = sizes_of(head)
        message = parse_header(_exactly(control, header))
        if not isinstance(message, RunStep):
            raise ProtocolError(f"unexpected message from the stage server: {message}")
        control.sendall(packed(tail.step(message, _exactly(control, body) if body else b"")))


def _exactly(control: socket.socket, num_bytes: int) -> bytes:
    """Return so many bytes; none at the end of the connection."""
    parts: list[bytes] = []
    while num_bytes:
        data = control.recv(min(num_bytes, 1 << 20))
        if not data:
            return b""
        parts.append(data)
        num_bytes -= len(data)
    return b"".join(parts)


def load_tail(folder: Path, engine_name: str, threads: int) -> tuple[Tail | None, Message]:
    """Load the stage; return it with the message that says how that went."""
    try:
        part = load_part(folder, engine_of(engine_name, threads))
        tail = tried(part)
    except (EdgeflError, OSError, MemoryError, RuntimeError) as error:
        return None, TailNotLoaded(error=(str(error) or type(error).__name__)[:MAX_ERROR_CHARS])
    return tail, TailUp(pid=os.getpid(), digest=part.info.digest)


def tried(part: DecoderPart) -> Tail:
    """Return the tail of a stage, after one row was computed."""
    tail, width = Tail(part), part.info.spec.hidden
    tail.step(RunStep(step=0, items=[_TRIED]), np.zeros((1, width), "<f4").tobytes())
    tail.step(RunStep(step=0, items=[], drop=[_TRIED.key]), b"")
    return tail


def chosen_engine(name: str) -> str:
    """Return what computes: with `auto` torch on a GPU that it can use, else numpy, which is faster on a CPU.

    torch is loaded only on a machine with a GPU: it takes seconds and 200 MB.
    """
    if name != "auto":
        return name
    if any(Path(one).exists() for one in GPU_FILES):
        with contextlib.suppress(ImportError):
            import torch

            if torch.cuda.is_available():
                return "torch:cuda"
    return "numpy"


def engine_of(name: str, threads: int) -> ArrayLibrary:
    """Return what computes, by its name in the options."""
    name = chosen_engine(name)
    if name == "numpy":
        return numpy_engine()
    made = torch_engine("" if name == "torch" else name.partition(":")[2])
    torch: Any = made.xp
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return made


def main() -> None:
    """Run as the stage server's child."""
    parser = argparse.ArgumentParser(prog="edgefl-tail", description="The process of a language model's tail.")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--engine", default="auto", help="auto, torch, torch:DEVICE or numpy")
    parser.add_argument("--cores", default="", help="numbers of the cores to use, separated by commas")
    parser.add_argument("--memory-mb", type=int, default=0, help="memory limit; 0 = none")
    arguments = parser.parse_args()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops its processes
    if arguments.cores:
        os.sched_setaffinity(0, [int(core) for core in arguments.cores.split(",")])
    limit_own_memory(arguments.memory_mb)
    control = socket.socket(fileno=arguments.control)
    tail, message = load_tail(arguments.folder, arguments.engine, len(os.sched_getaffinity(0)))
    control.sendall(packed(message))
    if tail is not None:
        serve(control, tail)


if __name__ == "__main__":
    main()
