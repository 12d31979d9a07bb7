"""Models that are loaded and serve: ONNX Runtime sessions, each proven by a warm-up run before it counts.

onnxruntime and numpy are imported when the first release is there, not before: an agent without one
stays small. Invariant: a swap replaces one reference; a request that has begun ends on the session it began on.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_agent.serving.board import label_of
from edgefl.errors import ProtocolError
from edgefl.models.session import new_session, ort_errors

INLINE_S = 0.002  # a model that is slower than that runs outside the event loop
THREADS_COST = 1.25  # what the event loop's runs may take longer on one thread: waking others costs the machine more
SLOW_S = 0.02  # one that once takes so long there was misjudged
WATCHED_RUNS = 20  # after a slow one
MAX_WARM_UPS, WARM_UP_S = 10, 0.05  # the quickest counts: others may have our core meanwhile
MAX_GROWTH = 64  # times the warm-up's elements are taken for as many times its time; not more, a model may be quadratic
# Operators whose time depends on values, not on shapes, as they stand in a model's bytes (op_type is field 4).
_BY_VALUE = (b"\x22\x04Loop", b"\x22\x04Scan", b"\x22\x05Range")
_ORT_TYPES: Mapping[str, str] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}
NUMPY_TYPES: Mapping[str, str] = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input or output as the Open Inference Protocol describes it; -1 = any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


class Pace:
    """How much work of a model the event loop can do without anybody noticing. Only ever gets stricter.

    A run that took long may only have waited for a core. Reading a thread's own time is dear, so it is read for
    some runs after such a one: a model that computes for so long itself has had its last run there.
    """

    def __init__(self, max_elements: int = 0) -> None:
        self.max_elements = max_elements  # of all inputs of a request
        self._watched = 0  # runs whose own time is to be read

    def begin(self) -> tuple[float, float]:
        """A run in the event loop begins."""
        return time.perf_counter(), time.thread_time() if self._watched else 0.0

    def end(self, start: tuple[float, float]) -> None:
        """It is over."""
        if self._watched:
            self._watched -= 1
            if start[1] and time.thread_time() - start[1] > SLOW_S:
                self.max_elements = 0
        elif time.perf_counter() - start[0] > SLOW_S:
            self._watched = WATCHED_RUNS


class Stop:
    """Ends a run from another thread: ONNX Runtime looks before each node of the graph."""

    def __init__(self) -> None:
        import onnxruntime as ort

        self.options = ort.RunOptions()

    def set(self) -> None:
        self.options.terminate = True


@dataclass(frozen=True)
class Served:
    """One version of a model, loaded."""

    name: str
    version: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    inline: bool  # quick enough to run in the event loop
    session: Any  # an onnxruntime.InferenceSession; thread-safe
    pace: Pace = field(default_factory=Pace)
    quick: Any = None  # the session for the event loop: on one thread where that is as fast; None = `session`

    @cached_property
    def input_infos(self) -> Mapping[str, TensorInfo]:
        """The inputs by name."""
        return {one.name: one for one in self.inputs}

    @cached_property
    def output_types(self) -> Mapping[str, str]:
        """The outputs' datatypes by name."""
        return {one.name: one.datatype for one in self.outputs}

    @cached_property
    def known_heads(self) -> dict[bytes, Any]:
        """What `edge_agent.serving.inference` keeps of requests that it has checked."""
        return {}

    @cached_property
    def label(self) -> bytes:
        """The name as it stands on the board of models at work."""
        return label_of(self.name)

    def is_quick(self, feeds: Mapping[str, Any]) -> bool:
        """Whether the event loop can wait for a run on these."""
        return self.inline and sum(value.size for value in feeds.values()) <= self.pace.max_elements

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Any], stop: Stop | None = None) -> list[Any]:
        """Compute outputs; raises ProtocolError where the model cannot take these values."""
        start = self.pace.begin() if stop is None else None
        try:
            session = self.quick if stop is None and self.quick is not None else self.session
            result: list[Any] = session.run(list(outputs), dict(feeds), stop.options if stop else None)
        except _run_errors() as cause:
            raise ProtocolError(f"model {self.name} version {self.version} cannot take this: {cause}") from cause
        if start is not None:
            self.pace.end(start)
        return result


class Models:
    """The models that serve, by name."""

    def __init__(self) -> None:
        self._served: dict[str, Served] = {}

    def get(self, name: str) -> Served | None:
        return self._served.get(name)

    def put(self, served: Served) -> None:
        """Begin to serve a version, in place of the one before it."""
        self._served[served.name] = served

    def drop(self, name: str) -> None:
        """Serve a model no longer."""
        self._served.pop(name, None)

    def versions(self) -> dict[str, int]:
        return {name: served.version for name, served in self._served.items()}


def load(name: str, version: int, path: Path) -> Served:
    """Load and warm up a model; raises ProtocolError for one that does not run, MissingExtra without ORT."""
    try:
        session = new_session(path, keeps_memory=False)
        inputs = tuple(_info(name, version, one) for one in session.get_inputs())
        outputs = tuple(_info(name, version, one) for one in session.get_outputs())
        seconds = _warm_up(session, inputs)
        inline, quick = seconds < INLINE_S and not _depends_on_values(path), session
        if inline:
            alone = new_session(path, threads=1, keeps_memory=False)
            if (alone_s := _warm_up(alone, inputs)) < seconds * THREADS_COST:
                quick, seconds = alone, alone_s
    except _run_errors() as cause:
        raise ProtocolError(f"model {name} version {version} does not load: {cause}") from cause
    elements = sum(math.prod(max(size, 1) for size in one.shape) for one in inputs)
    return Served(name, version, inputs, outputs, inline, session, Pace(_affordable(elements, seconds)), quick)


def _affordable(elements: int, seconds: float) -> int:
    return int(elements * min(MAX_GROWTH, INLINE_S / max(seconds, 1e-9)))


def _depends_on_values(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return any(text.find(operator) >= 0 for operator in _BY_VALUE)


def _info(name: str, version: int, one: Any) -> TensorInfo:
    datatype = _ORT_TYPES.get(one.type)
    if datatype is None:
        raise ProtocolError(
            f"model {name} version {version} has {one.name!r} of type {one.type}; served are: {', '.join(NUMPY_TYPES)}"
        )
    shape = tuple(size if isinstance(size, int) and size > 0 else -1 for size in one.shape)
    return TensorInfo(one.name, datatype, shape)


def _warm_up(session: Any, inputs: Sequence[TensorInfo]) -> float:
    """Run on zeros or on ones; returns the seconds of the quickest run after the first, which pays for all."""
    try:
        return _quickest(session, inputs, 0)
    except _run_errors():  # a divisor, say
        return _quickest(session, inputs, 1)


def _quickest(session: Any, inputs: Sequence[TensorInfo], value: int) -> float:
    import numpy as np

    feeds = {
        one.name: np.full([size if size > 0 else 1 for size in one.shape], value, NUMPY_TYPES[one.datatype])
        for one in inputs
    }
    session.run(None, feeds)
    runs_s: list[float] = []
    while not runs_s or (len(runs_s) < MAX_WARM_UPS and sum(runs_s) < WARM_UP_S):
        start_s = time.perf_counter()
        session.run(None, feeds)
        runs_s.append(time.perf_counter() - start_s)
    return min(runs_s)


def _run_errors() -> tuple[type[Exception], ...]:
    """Return what a model may raise where it is loaded or run: ONNX Runtime's own, and what it lets through."""
    return (*ort_errors(), RuntimeError, ValueError, MemoryError)
