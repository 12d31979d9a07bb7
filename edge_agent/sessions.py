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
from edgefl.models.session import new_session, run_errors
from edgefl.models.tensors import NUMPY_TYPES, TensorInfo, described

INLINE_S = 0.002  # a slower model runs outside the event loop
MAX_SLOWDOWN = 1.25  # accepted for one thread instead of several, because waking threads costs the machine more
SLOW_S = 0.02  # a run this slow in the event loop may mean that the model was misjudged
WATCHED_RUNS = 20  # after a slow run
MAX_WARM_UPS, WARM_UP_S = 10, 0.05  # the fastest run counts, because others may use our core
MAX_GROWTH = 64  # times the warm-up's elements; time is assumed linear up to here, since a model may be quadratic
__all__ = ["NUMPY_TYPES", "Cancellation", "InlineLimit", "LoadedModel", "Models", "TensorInfo", "load"]
# Operators whose time depends on values, not on shapes, as encoded in a model file (op_type is field 4).
_BY_VALUE = (b"\x22\x04Loop", b"\x22\x04Scan", b"\x22\x05Range")


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
    run_s: float = 0.0  # the fastest run on the smallest inputs of its sample

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
        except run_errors() as cause:
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


def load(name: str, version: int, path: Path, sample: Path | None = None) -> LoadedModel:
    """Load and warm up a model; raises ProtocolError if it does not run, MissingExtra without ORT.

    With a release's sample, it is run on that, and must compute what the sample says; without, on zeros or ones.
    """
    who = f"model {name} version {version}"
    try:
        session = new_session(path, keeps_memory=False)
        inputs, outputs = described(who, session.get_inputs()), described(who, session.get_outputs())
        feeds = None if sample is None else _checked_feeds(who, session, sample, inputs, outputs)
        seconds = _warm_up(session, inputs, feeds)
        inline, inline_session = seconds < INLINE_S and not _depends_on_values(path), session
        if inline:
            alone = new_session(path, threads=1, keeps_memory=False)
            if (alone_s := _warm_up(alone, inputs, feeds)) < seconds * MAX_SLOWDOWN:
                inline_session, seconds = alone, alone_s
    except ProtocolError:  # a ValueError, too
        raise
    except run_errors() as cause:
        raise ProtocolError(f"{who} does not load: {cause}") from cause
    elements = sum(math.prod(max(size, 1) for size in one.shape) for one in inputs)
    if feeds is not None:
        elements = sum(value.size for value in feeds.values())
    limit = InlineLimit(_max_inline_elements(elements, seconds))
    return LoadedModel(name, version, inputs, outputs, inline, session, limit, inline_session, seconds)


def _checked_feeds(
    who: str, session: Any, path: Path, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]
) -> Mapping[str, Any]:
    """Check a model on its sample; return the inputs of the smallest case."""
    from edgefl.models.sample import check_sample, read_sample

    sample = read_sample(path, who)
    try:
        check_sample(who, sample, lambda feeds: session.run(None, dict(feeds)), inputs, [one.name for one in outputs])
    except ProtocolError:
        raise
    except run_errors() as cause:
        raise ProtocolError(f"{who} does not run on its sample: {cause}") from cause
    return sample.cases[0].inputs


def _max_inline_elements(elements: int, seconds: float) -> int:
    return int(elements * min(MAX_GROWTH, INLINE_S / max(seconds, 1e-9)))


def _depends_on_values(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return any(text.find(operator) >= 0 for operator in _BY_VALUE)


def _warm_up(session: Any, inputs: Sequence[TensorInfo], feeds: Mapping[str, Any] | None) -> float:
    """Return the duration of the fastest run but the first, which is slow. Without feeds, on zeros, or else on ones."""
    if feeds is not None:
        return _fastest_run_s(session, feeds)
    try:
        return _fastest_run_s(session, _constant(inputs, 0))
    except run_errors():  # e.g. a division by zero
        return _fastest_run_s(session, _constant(inputs, 1))


def _constant(inputs: Sequence[TensorInfo], value: int) -> Mapping[str, Any]:
    import numpy as np

    return {
        one.name: np.full([size if size > 0 else 1 for size in one.shape], value, NUMPY_TYPES[one.datatype])
        for one in inputs
    }


def _fastest_run_s(session: Any, feeds: Mapping[str, Any]) -> float:
    feeds = dict(feeds)
    session.run(None, feeds)
    runs_s: list[float] = []
    while not runs_s or (len(runs_s) < MAX_WARM_UPS and sum(runs_s) < WARM_UP_S):
        start_s = time.perf_counter()
        session.run(None, feeds)
        runs_s.append(time.perf_counter() - start_s)
    return min(runs_s)
