"""What a stage's process finds out about its model, and how it computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cloud.stages.slots import Slots
from cloud.stages.stage_main import LoadedStage, compute, load_stage
from cloud.stages.wire import BatchDone, BatchFailed, RunBatch, StageFailed, StageUp, described_places
from tests import onnx_models


def model(tmp_path, nodes, shape, output=None, kind=TensorProto.FLOAT):
    """Write a model from x to y."""
    graph = helper.make_graph(
        nodes, "test",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, output or shape)],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("node", "shape", "words"),
    [
        (helper.make_node("Softmax", ["x"], ["y"], axis=1), ["rows", 4], ""),
        (helper.make_node("Softmax", ["x"], ["y"], axis=0), ["rows", 4], "a row of y depends on the other rows"),
        (helper.make_node("Identity", ["x"], ["y"]), [1, 4], "x FP32[1,4] has no first dimension of any size"),
        (helper.make_node("Transpose", ["x"], ["y"]), ["rows", "rows"], "for two rows y has shape"),
    ],
)
def test_whether_rows_can_be_merged_is_tried(tmp_path, node, shape, words) -> None:
    unmerged = LoadedStage(model(tmp_path, [node], shape), 1).unmerged
    assert unmerged.startswith(words)
    assert bool(unmerged) == bool(words)


def test_it_says_what_it_loaded(tmp_path) -> None:
    path = tmp_path / "affine.onnx"
    path.write_bytes(onnx_models.affine())
    stage, said = load_stage(path, 1)
    assert stage is not None
    assert said == StageUp(inputs=[("x", "FP32", (-1, 3))], outputs=[("y", "FP32", (-1, 3))], unmerged="")
    stage, said = load_stage(tmp_path / "none.onnx", 1)
    assert stage is None
    assert isinstance(said, StageFailed)
    assert "none.onnx" in said.error


def test_a_batch_and_what_is_wrong_with_one(tmp_path) -> None:
    path = tmp_path / "affine.onnx"
    path.write_bytes(onnx_models.affine())
    stage, slots = LoadedStage(path, 1), Slots(1, 4096)
    begin, end = slots.take()

    def answer(array, end=end):
        placed, free = slots.write([array], begin, end)
        return compute(RunBatch(batch=1, tensors=described_places({"x": placed}), free=free, end=end), slots, stage)

    done = answer(np.ones((2, 3), np.float32))
    assert isinstance(done, BatchDone)
    assert slots.read(done.placed()["y"]).tolist() == [[3.0] * 3] * 2
    wrong = answer(np.ones((2, 4), np.float32))
    assert isinstance(wrong, BatchFailed)
    assert not wrong.memory
    assert "Got: 4 Expected: 3" in wrong.error
    large = answer(np.ones((2, 3), np.float32), begin + 64)
    assert large == BatchFailed(
        batch=1, memory=True, error="its outputs are too large: a tensor has 24 bytes, and 0 are free for a batch"
    )
    slots.close()
