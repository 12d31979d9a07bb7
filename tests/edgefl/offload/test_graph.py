"""A model's layers, constants and what crosses, by hand; what cannot be split is refused in words."""

from __future__ import annotations

import pytest
from onnx import helper

from edgefl.errors import ConfigError
from edgefl.offload.graph import read_graph
from tests import onnx_models
from tests.edgefl.offload.graphs import node, residual, value, weight, write


def test_layers_are_the_nodes_that_depend_on_an_input_and_lead_to_an_output(tmp_path):
    graph = read_graph(residual(tmp_path / "m.onnx"))
    assert [one.name for one in graph.layers] == [
        "MatMul_xa", "Relu_h", "MatMul_hb", "Add_sum", "MatMul_last", "Add_y",
    ]  # fmt: skip
    assert (graph.inputs, graph.outputs, list(graph.constants)) == (("x",), ("y",), ["same_b"])
    assert graph.parameters == {"a": 64, "b": 64}
    assert [set(one) for one in graph.needs] == [{"a"}, set(), {"b"}, set(), {"a"}, set()]


def test_what_crosses_is_what_the_tail_reads_with_inputs_that_it_needs_late(tmp_path):
    graph = read_graph(residual(tmp_path / "m.onnx"))
    assert [graph.crossing(at) for at in range(7)] == [
        ("x",), ("x", "xa"), ("x", "h"), ("x", "h", "hb"), ("x", "sum"), ("x", "last"), (),
    ]  # fmt: skip
    assert [graph.head_outputs(at) for at in (5, 6)] == [(), ("y",)]


def test_a_cut_is_named_by_a_node_or_a_tensor(tmp_path):
    graph = read_graph(residual(tmp_path / "m.onnx"))
    assert [graph.position_of(one) for one in ("split:Relu_h", "Relu_h", "h", "split:sum")] == [2, 2, 2, 4]
    with pytest.raises(ConfigError, match=r"m\.onnx has no cut 'split:Tanh_unused'.*edgefl offload cuts"):
        graph.position_of("split:Tanh_unused")
    with pytest.raises(ConfigError, match="behind 'Add_y' no layer is left"):
        graph.position_of("Add_y")


def test_nodes_without_a_name_or_with_one_name_are_named_by_their_tensors(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["a"], name="same"), helper.make_node("Tanh", ["a"], ["b"], name="same"),
             helper.make_node("Abs", ["b"], ["y"])]  # fmt: skip
    graph = read_graph(write(tmp_path / "m.onnx", nodes, ["x"], ["y"]))
    assert [one.name for one in graph.layers] == ["a", "b", "y"]


def test_subgraphs_read_what_they_capture_at_any_depth(tmp_path):
    inner = helper.make_graph([node("Add", "h w", "u")], "inner", [], [value("u")])
    choose = node("If", "inside", "v", then_branch=inner, else_branch=inner)
    outer = helper.make_graph(
        [helper.make_node("Identity", ["yes"], ["inside"]), choose], "outer", [], [value("v")]
    )  # fmt: skip
    nodes = [node("Relu", "x", "h"), node("If", "yes", "y", then_branch=outer, else_branch=outer)]
    path = write(tmp_path / "m.onnx", nodes, ["x", value("yes", (), 9)], ["y"], [weight("w", 4)])
    graph = read_graph(path)
    assert graph.layers[1].reads == ("yes", "h", "w")
    assert graph.crossing(1) == ("yes", "h")
    assert [set(one) for one in graph.needs] == [set(), {"w"}]


def test_random_nodes_are_layers_and_run_once(tmp_path):
    nodes = [node("RandomNormal", "", "r", shape=[1, 4]), node("Add", "x r", "y")]
    assert [one.operator for one in read_graph(write(tmp_path / "m.onnx", nodes, ["x"], ["y"])).layers] == [
        "RandomNormal", "Add",
    ]  # fmt: skip


def test_a_tensor_that_is_an_input_in_another_form_is_known(tmp_path):
    nodes = [node("Reshape", "x all", "flat"), node("Identity", "flat", "same"), node("Relu", "same", "y")]
    path = write(tmp_path / "m.onnx", nodes, ["x"], ["y"], [helper.make_tensor("all", 7, [1], [-1])])
    assert read_graph(path).input_copies == {"x", "flat", "same"}


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("no onnx")
    with pytest.raises(ConfigError, match="is not an ONNX model"):
        read_graph(tmp_path / "text.onnx")
    with pytest.raises(ConfigError, match="cannot read"):
        read_graph(tmp_path / "none.onnx")
    nodes = [node("Relu", "late", "y"), node("Tanh", "x", "late")]
    with pytest.raises(ConfigError, match="'Relu_y' reads 'late' before any node makes it"):
        read_graph(write(tmp_path / "m.onnx", nodes, ["x"], ["y"]))
    path = residual(tmp_path / "e.onnx", external=True)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ConfigError, match=r"e\.onnx"):
        read_graph(path)


def test_a_model_with_a_loop_has_its_layers(tmp_path):
    (tmp_path / "m.onnx").write_bytes(onnx_models.counter())
    assert [one.operator for one in read_graph(tmp_path / "m.onnx").layers] == ["Loop"]
