"""A stage's real process: it loads, computes, is killed, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest

from cloud.stages.slots import Slots
from cloud.stages.stage_process import StageProcess, StageSpec
from edgefl.errors import ProtocolError
from tests import onnx_models

LOAD_S = 300.0


class Heard:
    """What a stage says, as a queue."""

    def __init__(self) -> None:
        self.said: asyncio.Queue = asyncio.Queue()

    def done(self, stage, batch, tensors, free) -> None:
        self.said.put_nowait(("done", batch, tensors))

    def failed(self, stage, batch, error, *, memory) -> None:
        self.said.put_nowait(("failed", batch, error, memory))

    def changed(self, stage, lost, reason) -> None:
        self.said.put_nowait(("up", lost, "") if stage.is_up else ("down", lost, reason))


@pytest.fixture
def stage(tmp_path):
    """Run a check on a stage of a model: check(stage, heard, slots)."""

    def run(model, check, **limits):
        path = tmp_path / "stage.onnx"
        path.write_bytes(model)

        async def within():
            slots, heard = Slots(1, 8 << 20), Heard()
            one = StageProcess(1, StageSpec(path=path, **{"load_s": LOAD_S, **limits}), slots, heard)
            task = asyncio.create_task(one.run())
            try:
                await check(one, heard, slots)
            finally:
                task.cancel()
                await asyncio.wait([task])
                slots.close()

        asyncio.run(within())

    return run


def test_it_computes_is_killed_and_comes_back(stage, alive) -> None:
    async def check(one, heard, slots):
        facts = await one.first_load
        assert [str(info) for info in (*facts.inputs, *facts.outputs)] == ["x FP32[-1,3]", "y FP32[-1,3]"]
        assert facts.unmerged == ""
        assert (await heard.said.get())[0] == "up"
        begin, end = slots.take()
        placed, free = slots.write([np.ones((2, 3), np.float32)], begin, end)
        one.send(7, {"x": placed}, free, end)
        kind, batch, tensors = await heard.said.get()
        assert (kind, batch, slots.read(tensors["y"]).tolist()) == ("done", 7, [[3.0] * 3] * 2)
        former = one.pid
        one.send(8, {"x": placed}, free, end)
        os.kill(former, signal.SIGKILL)
        while (said := await heard.said.get())[0] == "done":  # it may have been quicker
            pass
        assert said[0] == "down"
        assert "was killed by SIGKILL" in said[2]
        assert (await heard.said.get())[0] == "up"
        assert one.pid != former
        one.send(9, {"x": placed}, free, end)
        assert (await heard.said.get())[:2] == ("done", 9)
        pids.append(one.pid)

    pids: list[int] = []
    stage(onnx_models.affine(), check)
    assert not alive(pids[0])


def test_a_batch_that_takes_too_long_ends_the_process(stage) -> None:
    async def check(one, heard, slots):
        await one.first_load
        assert (await heard.said.get())[0] == "up"
        begin, end = slots.take()
        placed, free = slots.write([np.array(2**40, np.int64)], begin, end)
        one.send(1, {"times": placed}, free, end)
        one.send(2, {"times": placed}, free, end)
        kind, lost, reason = await heard.said.get()
        assert (kind, lost, reason) == ("down", [1, 2], "a batch took longer than 0.5 s")

    stage(onnx_models.counter(), check, run_s=0.5)


def test_values_that_end_the_kernel_end_the_process_only(stage) -> None:
    async def check(one, heard, slots):
        await one.first_load
        assert (await heard.said.get())[0] == "up"
        begin, end = slots.take()
        a, free = slots.write([np.array([[-(2**31)]], np.int32)], begin, end)
        b, free = slots.write([np.array([[-1]], np.int32)], free, end)
        one.send(1, {"a": a, "b": b}, free, end)
        kind, lost, reason = await heard.said.get()
        assert (kind, lost) == ("down", [1])
        assert "was killed by SIGFPE" in reason

    stage(onnx_models.divider(), check)


@pytest.mark.parametrize(
    ("model", "limits", "words"),
    [
        (b"no model", {}, "stage 1 does not start: its model cannot be loaded: "),
        (onnx_models.endless_start(), {"load_s": 20.0}, "stage 1 does not start: the model was not loaded in 20 s"),
    ],
)
def test_a_model_that_does_not_load(stage, model, limits, words) -> None:
    async def check(one, heard, slots):
        with pytest.raises(ProtocolError, match=words):
            await one.first_load

    stage(model, check, **limits)
