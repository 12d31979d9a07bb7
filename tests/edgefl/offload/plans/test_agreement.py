"""The gate of wire formats: by hand, and by a task's own metric."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from edgefl.errors import ConfigError, ProtocolError
from edgefl.offload.plans.agreement import WireGate, _difference, batches
from edgefl.offload.source import source_of_file, source_of_task
from edgefl.offload.stages import SplitModel, split_model
from edgefl.task import load_task
from tests.edgefl.offload.graphs import cuts_of, node, rows, write


def test_differences_by_hand():
    whole = np.array([[3.0, 4.0]], np.float32)
    assert _difference([whole], [np.array([[3.0, 4.5]])]) == ("relative error", 0.1)
    scores = np.eye(50, dtype=np.float32)
    other = scores.copy()
    other[:3] = np.roll(other[:3], 1, axis=1)
    assert _difference([scores], [other]) == ("other decisions", 3 / 50)
    classes = np.arange(10)
    assert _difference([classes, classes], [classes, classes % 9]) == ("other values", 1 / 20)
    assert _difference([0 * whole], [whole]) == ("relative error", 1.0)


def linear(path, outlier=1.0):
    """y = (x @ a) @ b: a has one large channel."""
    a = np.eye(4, dtype=np.float32)
    a[:, 0] *= outlier
    nodes = [node("MatMul", "x a", "h"), node("MatMul", "h b", "y")]
    weights = [numpy_helper.from_array(a, "a"), numpy_helper.from_array(np.linalg.inv(a), "b")]
    return write(path, nodes, ["x"], ["y"], weights)


@pytest.mark.parametrize(("outlier", "accepted"), [(1.0, True), (3e3, False)])
def test_a_format_that_loses_too_much_is_refused(tmp_path, outlier, accepted):
    path = linear(tmp_path / "m.onnx", outlier)
    source = source_of_file(path)
    graph, (cut,) = cuts_of(path, source.feeds)
    model = SplitModel(split_model(graph, cut, tmp_path))
    gate = WireGate(source, 0.02)
    assert gate.judged_by == "agreement of outputs on samples"
    assert gate.judge(model, "fp32").drop == pytest.approx(0, abs=1e-6)
    judged = gate.judge(model, "int8")
    assert (judged.measure, judged.accepted) == ("relative error", accepted)
    assert (judged.drop > 0.02) is not accepted


def test_own_samples_judge_instead_of_the_release_s(tmp_path):
    path = linear(tmp_path / "m.onnx")
    source = source_of_file(path)
    graph, (cut,) = cuts_of(path, source.feeds)
    model = SplitModel(split_model(graph, cut, tmp_path))
    judged = WireGate(source, "2%", batches({"x": rows(100)})).judge(model, "int8")
    assert judged.measure == "other decisions"
    with pytest.raises(ConfigError, match="--max-drop"):
        WireGate(source, "much")


def test_what_a_format_cannot_hold_is_not_accepted(tmp_path):
    class Fails:
        def run(self, feeds, transport=None, /):
            raise ProtocolError("fp16 ends at 65504")

    source = source_of_file(linear(tmp_path / "m.onnx"))
    assert not WireGate(source, 1.0).judge(Fails(), "fp16").accepted


def test_a_task_judges_by_its_own_metric(tmp_path):
    source = source_of_task(load_task("examples/digits"), tmp_path)
    gate = WireGate(source, 0.05)
    assert gate.judged_by == "the task's accuracy"
    graph, cuts = cuts_of(source.path, source.feeds)
    model = SplitModel(split_model(graph, cuts[len(cuts) // 2], tmp_path))
    judged = gate.judge(model, "fp16")
    assert (judged.measure, judged.accepted) == ("accuracy", True)
    assert gate.judge(model, "fp32").drop == 0


def test_inputs_are_divided_into_batches():
    assert [len(one["x"]) for one in batches({"x": rows(70)})] == [32, 32, 6]
    assert len(batches({"x": rows(3), "length": np.array(7)})) == 1
    assert len(batches({"x": rows(3), "y": rows(4)})) == 1
