"""Stages whose work a test does itself: the pipeline is tested without a process, a clock of a model, or a network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cloud.stages.fair_queue import BatchRule
from cloud.stages.pipeline import Pipeline, PipelineLimits
from cloud.stages.stage_process import StageFacts, StageSpec
from edgefl.models.tensors import TensorInfo


class ScriptedStage:
    """Stage number n takes t(n-1) and returns t(n) = 2 t(n-1) + 1, when the test says so."""

    def __init__(self, number, spec, memory, callbacks, *, unmerged="") -> None:
        self.number, self._memory, self._callbacks = number, memory, callbacks
        self.facts = StageFacts(
            inputs=(TensorInfo(f"t{number - 1}", "FP32", (-1, 2)),),
            outputs=(TensorInfo(f"t{number}", "FP32", (-1, 2)),),
            unmerged=unmerged,
        )
        self.is_up, self.reason, self.pid = False, "it is starting", 0
        self.first_load = asyncio.get_running_loop().create_future()
        self.given = []

    @property
    def num_running(self) -> int:
        return len(self.given)

    async def run(self) -> None:
        self.come_up()
        await asyncio.Event().wait()

    def come_up(self) -> None:
        self.is_up, self.reason = True, ""
        if not self.first_load.done():
            self.first_load.set_result(self.facts)
        self._callbacks.changed(self, [], "")

    def send(self, batch, tensors, free, end) -> None:
        self.given.append((batch, tensors, free, end))

    def rows(self):
        """Return the first values of the rows of each batch that it was given."""
        return [self._memory.read(tensors[f"t{self.number - 1}"])[:, 0].tolist() for _, tensors, _, _ in self.given]

    def finish(self) -> None:
        """Compute the oldest batch."""
        batch, tensors, free, end = self.given.pop(0)
        result = 2 * self._memory.read(tensors[f"t{self.number - 1}"]) + 1
        placed, free = self._memory.write([result], free, end)
        self._callbacks.done(self, batch, {f"t{self.number}": placed}, free)

    def fail(self, error, *, memory=False) -> None:
        batch, *_ = self.given.pop(0)
        self._callbacks.failed(self, batch, error, memory=memory)

    def die(self, reason="it was killed") -> None:
        lost, self.given = [batch for batch, *_ in self.given], []
        self.is_up, self.reason = False, reason
        self._callbacks.changed(self, lost, reason)


@pytest.fixture
def scripted() -> Callable[..., contextlib.AbstractAsyncContextManager]:
    """Run a pipeline of scripted stages; yields it and its stages."""

    @contextlib.asynccontextmanager
    async def run(num_stages=1, *, unmerged="", max_rows=4, max_wait_s=0.0, entries=(0,), **limits):
        stages = []

        def make(*given):
            stages.append(ScriptedStage(*given, unmerged=unmerged))
            return stages[-1]

        rule = BatchRule(max_rows=max_rows, max_wait_s=max_wait_s)
        specs = [StageSpec(path=Path("unused"))] * num_stages
        pipeline = Pipeline(
            "m", specs, PipelineLimits(rule=rule, **{"slot_bytes": 1 << 20, **limits}), make, entries=entries
        )
        async with pipeline.running():
            yield pipeline, stages
            assert not pipeline._batches or any(stage.given for stage in stages)

    return run


def rows(*values):
    """Return an input with these rows."""
    return {"t0": np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)}


def values_of(outputs):
    """Return the first values of the rows of a result."""
    ((_, datatype, shape, raw),) = outputs
    assert datatype == "FP32"
    return np.frombuffer(raw, np.float32).reshape(shape)[:, 0].tolist()
