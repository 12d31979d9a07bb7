"""A model cut into stages: the same outputs, and clear words for a cut that is none."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cloud.stages.cuts import stages_of
from edgefl.errors import ConfigError


@pytest.fixture
def network(tmp_path):
    """y = relu(relu(x W1) W2) W3 + h1 (a residual over the middle), with the shape of h1 read by a node of its own."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), f"w{n}") for n in (1, 2, 3)]
    half = numpy_helper.from_array(np.float32(0.5), "half")
    nodes = [
        helper.make_node("Constant", [], ["k"], value=half),
        helper.make_node("MatMul", ["x", "w1"], ["m1"]), helper.make_node("Relu", ["m1"], ["h1"]),
        helper.make_node("MatMul", ["h1", "w2"], ["m2"]), helper.make_node("Relu", ["m2"], ["h2"]),
        helper.make_node("Mul", ["h2", "k"], ["h3"]), helper.make_node("MatMul", ["h3", "w3"], ["m3"]),
        helper.make_node("Mul", ["m3", "k"], ["m4"]), helper.make_node("Add", ["m4", "h1"], ["y"]),
    ]  # fmt: skip
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "net", [tensor("x", TensorProto.FLOAT, ["rows", 4])], [tensor("y", TensorProto.FLOAT, ["rows", 4])],
        weights,
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def run(paths, feeds):
    """Run stages, each on what the ones before it computed."""
    known = dict(feeds)
    for path in paths:
        session = onnxruntime.InferenceSession(path)
        names = [one.name for one in session.get_outputs()]
        known |= dict(
            zip(names, session.run(None, {one.name: known[one.name] for one in session.get_inputs()}), strict=True)
        )
    return known


X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


@pytest.mark.parametrize(
    "borders", [[["h1"]], [["m1"]], [["h1", "m2"]], [["h1"], ["m2"]], [["m1"], ["h1"], ["h3"], ["m3"]]]
)
def test_the_stages_compute_what_the_model_does(network, tmp_path, borders) -> None:
    paths = stages_of(network, borders, tmp_path)
    assert [path.name for path in paths] == [f"stage-{number}.onnx" for number in range(1, len(borders) + 2)]
    whole = run([network], {"x": X})["y"]
    np.testing.assert_array_equal(run(paths, {"x": X})["y"], whole)
    nodes = [node.output[0] for path in paths for node in onnx.load(path).graph.node if node.op_type != "Constant"]
    assert sorted(nodes) == ["h1", "h2", "h3", "m1", "m2", "m3", "m4", "y"]  # each in one stage


def test_a_tail_begins_where_the_head_ends(network, tmp_path) -> None:
    known = run([*stages_of(network, [["h1"]], tmp_path)][:1], {"x": X})
    tail = stages_of(network, [["m3"]], tmp_path, begin=["h1"])
    result = run(tail, {"h1": known["h1"]})["y"]
    np.testing.assert_array_equal(result, run([network], {"x": X})["y"])
    assert [one.name for one in onnx.load(tail[0]).graph.input] == ["h1"]


@pytest.mark.parametrize(
    ("borders", "begin", "words"),
    [
        ([["nothing"]], [], "net.onnx has no tensor 'nothing'; it has, for example: "),
        ([["m2"]], [], "stage 2 needs more than the tensors at its border: h1. Name them in the border, joined with "),
        ([["h3"], ["m2"]], [], "stage 2 needs more than"),
        ([["h1"], ["h1"]], [], "stage 2 would only pass 'h1' on; leave out one of the borders"),
        ([], ["m3"], "stage 1 needs more than the tensors at its border: h1"),
    ],
)
def test_cuts_that_are_none(network, tmp_path, borders, begin, words) -> None:
    with pytest.raises(ConfigError, match=words):
        stages_of(network, borders, tmp_path, begin)


def test_what_is_no_model(tmp_path) -> None:
    path = tmp_path / "none.onnx"
    with pytest.raises(ConfigError, match="cannot be cut: it is not a model that ONNX can read"):
        stages_of(path, [["h"]], tmp_path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="cannot be cut: it is not a model that ONNX can read"):
        stages_of(path, [["h"]], tmp_path)
