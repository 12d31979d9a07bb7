"""The list of cuts, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from edgefl.errors import ConfigError
from edgefl.offload.cuts import all_tensors
from edgefl.offload.graph import read_graph
from tests.edgefl.offload.graphs import cuts_of, node, residual, rows, write


def test_bytes_on_both_sides_and_across_by_hand(tmp_path):
    _, cuts = cuts_of(residual(tmp_path / "m.onnx"), {"x": rows()})
    assert [(one.name, one.num_bytes, one.is_single) for one in cuts] == [
        ("split:MatMul_xa", 32, False), ("split:Relu_h", 32, False), ("split:MatMul_hb", 48, False),
        ("split:Add_sum", 32, False), ("split:MatMul_last", 32, False),
    ]  # fmt: skip
    assert [(one.device_parameter_bytes, one.cloud_parameter_bytes, one.shared_parameter_bytes) for one in cuts] == [
        (64, 128, 64), (64, 128, 64), (128, 64, 64), (128, 64, 64), (128, 0, 0),
    ]  # fmt: skip
    assert all(one.sends_inputs for one in cuts)  # x is needed by the last layer
    told = cuts[0].as_json()
    assert told["tensors"][1] == {"name": "xa", "type": "float32", "shape": [1, 4], "bytes": 16}


def test_a_chain_has_single_cuts_and_sends_no_input(tmp_path):
    nodes = [node("Relu", "x", "a"), node("Cast", "a", "b", to=TensorProto.FLOAT16), node("Cast", "b", "y", to=1)]
    _, cuts = cuts_of(write(tmp_path / "m.onnx", nodes, ["x"], ["y"]), {"x": rows()})
    assert [(one.num_bytes, one.is_single, one.sends_inputs) for one in cuts] == [(16, True, False), (8, True, False)]


def test_what_cannot_be_sent_is_no_cut(tmp_path):
    """A sequence crosses in the middle, texts at the end."""
    nodes = [
        node("Relu", "x", "h"), node("SequenceConstruct", "h h", "s"), node("ConcatFromSequence", "s", "c", axis=0),
        node("Cast", "c", "t", to=TensorProto.STRING), node("Cast", "t", "y", to=1),
    ]  # fmt: skip
    _, cuts = cuts_of(write(tmp_path / "m.onnx", nodes, ["x"], ["y"]), {"x": rows()})
    assert [one.name for one in cuts] == ["split:Relu_h", "split:ConcatFromSequence_c"]


def test_two_halves_that_share_nothing_have_no_cut_between_them(tmp_path):
    nodes = [node("Relu", "x", "y"), node("RandomNormal", "", "z", shape=[1, 4])]
    _, cuts = cuts_of(write(tmp_path / "m.onnx", nodes, ["x"], ["y", "z"]), {"x": rows()})
    assert cuts == []


def test_all_tensors_are_those_of_the_model(tmp_path):
    graph = read_graph(residual(tmp_path / "m.onnx", external=True))
    found, x = all_tensors(graph, {"x": rows()}), rows()
    assert found.keys() == {"x", "xa", "h", "hb", "sum", "last", "y"}
    assert np.array_equal(found["h"], np.maximum(found["xa"], 0))
    assert np.allclose(found["y"], found["last"] + x)
    with pytest.raises(ConfigError, match="does not run on its sample"):
        all_tensors(graph, {"x": np.zeros((1, 5), np.float32)})


def test_the_file_s_own_model_is_left_as_it_was(tmp_path):
    graph = read_graph(residual(tmp_path / "m.onnx"))
    all_tensors(graph, {"x": rows()})
    assert [one.name for one in graph.model.graph.output] == ["y"]
    assert graph.model == read_graph(graph.path).model
