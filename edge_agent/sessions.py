"""Loaded models: ONNX Runtime sessions, each tested by a warm-up run.

onnxruntime and numpy are imported with the first release, so that a device without one uses little memory.
Invariant: a new version replaces one reference; a running request finishes on the session that it started on.
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

INLINE_S = 0.002  # a slower model runs outside the event loop
MAX_SLOWDOWN = 1.25  # accepted for one thread instead of several, because waking threads costs the machine more
SLOW_S = 0.02  # a run this slow in the event loop may mean that the model was misjudged
WATCHED_RUNS = 20  # after a slow run
MAX_WARM_UPS, WARM_UP_S = 10, 0.05  # the fastest run counts, because others may use our core
MAX_GROWTH = 64  # times the warm-up's elements; time is assumed linear up to here, since a model may be quadratic
# Operators whose time depends on values, not on shapes, as encoded in a model file (op_type is field 4).
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


class InlineLimit:
    """How large a model's requests may be to run in the event loop. The limit never rises.

    A slow run may only have waited for a core. Reading a thread's CPU time is expensive, so it is read only for some
    runs after a slow one: if the computation itself was slow, the model does not run in the event loop any more.
    """

    def __init__(self, max_elements: int = 0) -> None:
        self.max_elements = max_elements  # of all inputs of a request
        self._watched = 0  # number of next runs whose CPU time is read

    def begin(self) -> tuple[float, float]:
        """Record the start of a run in the event loop; pass the result to `end`."""
        return time.perf_counter(), time.thread_time() if self._watched else 0.0

    def end(self, start: tuple[float, float]) -> None:
        """Record the end of a run."""
        if self._watched:
            self._watched -= 1
            if start[1] and time.thread_time() - start[1] > SLOW_S:
                self.max_elements = 0
        elif time.perf_counter() - start[0] > SLOW_S:
            self._watched = WATCHED_RUNS


class Cancellation:
    """Cancels a run from another thread: ONNX Runtime checks it before each node of the graph."""

    def __init__(self) -> None:
        import onnxruntime as ort

        self.options = ort.RunOptions()

    def cancel(self) -> None:
        self.options.terminate = True


@dataclass(frozen=True)
class LoadedModel:
    """A loaded version of a model."""

    name: str
    version: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    inline: bool  # fast enough to run in the event loop
    session: Any  # an onnxruntime.InferenceSession; thread-safe
    inline_limit: InlineLimit = field(default_factory=InlineLimit)
    inline_session: Any = None  # for the event loop: on one thread if that is as fast; None = `session`

    @cached_property
    def input_infos(self) -> Mapping[str, TensorInfo]:
        """The inputs by name."""
        return {one.name: one for one in self.inputs}

    @cached_property
    def output_types(self) -> Mapping[str, str]:
        """The outputs' datatypes by name."""
        return {one.name: one.datatype for one in self.outputs}

    @cached_property
    def cached_headers(self) -> dict[bytes, Any]:
        """The cache of `edge_agent.serving.inference`: parsed JSON headers of binary requests."""
        return {}

    @cached_property
    def label(self) -> bytes:
        """The name as stored on the board of running models."""
        return label_of(self.name)

    def runs_inline(self, feeds: Mapping[str, Any]) -> bool:
        """Whether a run on these inputs is fast enough for the event loop."""
        return self.inline and sum(value.size for value in feeds.values()) <= self.inline_limit.max_elements

    def run(
        self, outputs: Sequence[str], feeds: Mapping[str, Any], cancellation: Cancellation | None = None
    ) -> list[Any]:
        """Compute outputs; raises ProtocolError if the model cannot process these values."""
        start = self.inline_limit.begin() if cancellation is None else None
        try:
            session = self.session if cancellation is not None or self.inline_session is None else self.inline_session
            result: list[Any] = session.run(list(outputs), dict(feeds), cancellation.options if cancellation else None)
        except _run_errors() as cause:
            raise ProtocolError(
                f"model {self.name} version {self.version} cannot process these values: {cause}"
            ) from cause
        if start is not None:
            self.inline_limit.end(start)
        return result


class Models:
    """The models being served, by name."""

    def __init__(self) -> None:
        self._served: dict[str, LoadedModel] = {}

    def get(self, name: str) -> LoadedModel | None:
        return self._served.get(name)

    def put(self, served: LoadedModel) -> None:
        """Serve this version instead of the previous one."""
        self._served[served.name] = served

    def drop(self, name: str) -> None:
        """Stop serving a model."""
        self._served.pop(name, None)

    def versions(self) -> dict[str, int]:
        return {name: served.version for name, served in self._served.items()}


def load(name: str, version: int, path: Path) -> LoadedModel:
    """Load and warm up a model; raises ProtocolError if it does not run, MissingExtra without ORT."""
    try:
        session = new_session(path, keeps_memory=False)
        inputs = tuple(_info(name, version, one) for one in session.get_inputs())
        outputs = tuple(_info(name, version, one) for one in session.get_outputs())
        seconds = _warm_up(session, inputs)
        inline, inline_session = seconds < INLINE_S and not _depends_on_values(path), session
        if inline:
            alone = new_session(path, threads=1, keeps_memory=False)
            if (alone_s := _warm_up(alone, inputs)) < seconds * MAX_SLOWDOWN:
                inline_session, seconds = alone, alone_s
    except _run_errors() as cause:
        raise ProtocolError(f"model {name} version {version} does not load: {cause}") from cause
    elements = sum(math.prod(max(size, 1) for size in one.shape) for one in inputs)
    limit = InlineLimit(_max_inline_elements(elements, seconds))
    return LoadedModel(name, version, inputs, outputs, inline, session, limit, inline_session)


def _max_inline_elements(elements: int, seconds: float) -> int:
    return int(elements * min(MAX_GROWTH, INLINE_S / max(seconds, 1e-9)))


def _depends_on_values(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return any(text.find(operator) >= 0 for operator in _BY_VALUE)


def _info(name: str, version: int, one: Any) -> TensorInfo:
    datatype = _ORT_TYPES.get(one.type)
    if datatype is None:
        raise ProtocolError(
            f"model {name} version {version} has {one.name!r} of type {one.type}; expected: {', '.join(NUMPY_TYPES)}"
        )
    shape = tuple(size if isinstance(size, int) and size > 0 else -1 for size in one.shape)
    return TensorInfo(one.name, datatype, shape)


def _warm_up(session: Any, inputs: Sequence[TensorInfo]) -> float:
    """Run on zeros, or else on ones; return the duration of the fastest run but the first, which is slow."""
    try:
        return _fastest_run_s(session, inputs, 0)
    except _run_errors():  # e.g. a division by zero
        return _fastest_run_s(session, inputs, 1)


def _fastest_run_s(session: Any, inputs: Sequence[TensorInfo], value: int) -> float:
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
    """Return the exceptions of loading or running a model: ONNX Runtime's own, and those that it passes on."""
    return (*ort_errors(), RuntimeError, ValueError, MemoryError)
