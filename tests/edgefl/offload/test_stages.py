"""Every cut of every kind of graph is split, run and compared; a stage has only what it needs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.utils
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import offload_models
from edgefl.errors import ConfigError, ParityError
from edgefl.models.session import new_session
from edgefl.offload.cuts import all_tensors
from edgefl.offload.graph import read_graph
from edgefl.offload.stages import SplitModel, check_parity, split_model, write_stages
from tests.edgefl.offload.graphs import cuts_of, node, residual, rows, value, weight, write


def split_everywhere(path, feeds, folder):
    """Return the largest relative difference of each cut."""
    graph, cuts = cuts_of(path, feeds[0])
    assert cuts
    return {one.name: check_parity(graph, SplitModel(split_model(graph, one, folder)), feeds, one) for one in cuts}


def initializers(path):
    return sorted(one.name for one in onnx.load(path).graph.initializer)


@pytest.mark.parametrize("external", [False, True])
def test_tied_weights_late_inputs_and_constants(tmp_path, external):
    path = residual(tmp_path / "m.onnx", external=external)
    worst = split_everywhere(path, [{"x": rows()}, {"x": rows(3)}], tmp_path)
    assert max(worst.values()) < 1e-6
    assert len(worst) == 5
    graph, cuts = cuts_of(path, {"x": rows()})
    files = split_model(graph, cuts[1], tmp_path)
    assert (initializers(files.head), initializers(files.tail)) == (["a"], ["a", "b"])
    assert (files.crossing, files.sent_inputs) == (("x", "h"), ("x",))
    files = split_model(graph, cuts[-1], tmp_path)
    assert (initializers(files.head), initializers(files.tail)) == (["a", "b"], [])


def test_a_stage_with_external_weights_keeps_them_beside_it(tmp_path):
    nodes, weights = (
        [node("MatMul", "x w", "h"), node("MatMul", "h v", "y")],
        [weight("w", 4, 512), weight("v", 512, 4)],
    )
    path = write(tmp_path / "m.onnx", nodes, ["x"], [value("y", None)], weights, external=True)
    (tmp_path / "out").mkdir()
    graph, cuts = cuts_of(path, {"x": rows()})
    files = split_model(graph, cuts[0], tmp_path / "out")
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "head.onnx", "head.onnx.data", "tail.onnx", "tail.onnx.data",
    ]  # fmt: skip
    assert check_parity(graph, SplitModel(files), [{"x": rows()}], cuts[0]) < 1e-5


def test_outputs_that_the_head_knows_stay_on_the_device(tmp_path):
    nodes = [node("Relu", "x", "a"), node("Tanh", "a", "b"), node("Exp", "b", "y")]
    graph, cuts = cuts_of(write(tmp_path / "m.onnx", nodes, ["x"], ["y", "a"]), {"x": rows()})
    split = SplitModel(split_model(graph, cuts[1], tmp_path))
    crossing, known = split.head({"x": rows()})
    assert (list(crossing), list(known)) == (["b"], ["a"])
    assert list(split.tail(crossing)) == ["y"]
    assert list(split.run({"x": rows()})) == ["y", "a"]


def test_control_flow_takes_along_what_it_captures(tmp_path):
    branches = {
        name: helper.make_graph([node(operator, "h w", "v")], name, [], [value("v")])
        for name, operator in (("then_branch", "Add"), ("else_branch", "Mul"))
    }
    nodes = [node("Relu", "x", "h"), node("Exp", "h", "e"), node("If", "yes", "c", **branches), node("Add", "c e", "y")]
    path = write(tmp_path / "m.onnx", nodes, ["x", value("yes", (), 9)], ["y"], [weight("w", 4)])
    feeds = [{"x": rows(), "yes": np.array(answer)} for answer in (True, False)]
    assert max(split_everywhere(path, feeds, tmp_path).values()) < 1e-6


def test_a_loop_that_captures_is_split(tmp_path):
    body = helper.make_graph(
        [node("Identity", "go", "on"), node("Add", "state h", "next")], "body",
        [value("i", (), 7), value("go", (), 9), value("state")], [value("on", (), 9), value("next")],
    )  # fmt: skip
    nodes = [node("Relu", "x", "h"), node("Tanh", "h", "t"), node("Loop", "times yes t", "l", body=body),
             node("Abs", "l", "y")]  # fmt: skip
    weights = [helper.make_tensor("times", 7, [], [3]), helper.make_tensor("yes", 9, [], [True])]
    path = write(tmp_path / "m.onnx", nodes, ["x"], ["y"], weights)
    assert len(split_everywhere(path, [{"x": rows()}], tmp_path)) == 3


def test_sparse_weights_are_split(tmp_path):
    dense = numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "w")
    places = numpy_helper.from_array(np.array([1, 14], np.int64), "w_at")
    sparse = helper.make_sparse_tensor(dense, places, [4, 4])
    nodes = [node("Relu", "x", "h"), node("MatMul", "h w", "m"), node("Tanh", "m", "y")]
    path = write(tmp_path / "m.onnx", nodes, ["x"], ["y"], sparse_initializer=[sparse])
    assert len(split_everywhere(path, [{"x": rows()}], tmp_path)) == 2


def test_a_stage_is_what_onnx_s_own_extractor_makes(tmp_path):
    """Where that can be used: no subgraphs, no sparse weights, every tensor declared."""
    path = residual(tmp_path / "m.onnx", value_info=[value(name) for name in ("xa", "h", "hb", "sum", "last")])
    graph, cuts = cuts_of(path, {"x": rows()})
    theirs = onnx.utils.Extractor(onnx.load(path)).extract_model(["x", "sum"], ["y"])
    ours = onnx.load(split_model(graph, cuts[3], tmp_path).tail)
    assert list(ours.graph.node) == list(theirs.graph.node)
    assert list(ours.graph.initializer) == list(theirs.graph.initializer)
    assert list(ours.graph.input) == list(theirs.graph.input)


def test_stages_that_compute_something_else_are_refused(tmp_path):
    graph, cuts = cuts_of(residual(tmp_path / "m.onnx"), {"x": rows()})
    files = split_model(graph, cuts[1], tmp_path)
    model = onnx.load(files.tail)
    model.graph.initializer[0].raw_data = np.zeros((4, 4), np.float32).tobytes()
    onnx.save(model, files.tail)
    with pytest.raises(ParityError, match=r"split at split:Relu_h does not compute .* output 'y' differs by"):
        check_parity(graph, SplitModel(files), [{"x": rows()}], cuts[1])
    with pytest.raises(ParityError, match="a stage does not run"):
        check_parity(graph, SplitModel(files), [{"x": np.zeros((1, 3), np.float32)}], cuts[1])


@pytest.mark.parametrize("name", offload_models.MODELS)
def test_every_cut_of_a_real_model(tmp_path, name):
    path = tmp_path / "m.onnx"
    offload_models.export(name, path)
    inputs = offload_models.pictures(name, 3).numpy()
    worst = split_everywhere(path, [{"input": inputs[:1]}, {"input": inputs}], tmp_path)
    assert len(worst) >= 18
    assert max(worst.values()) < 1e-5
    whole = read_graph(path)
    assert sum(whole.parameters.values()) > 50_000


@pytest.mark.parametrize("positions", [[0, 2, 5], [0, 1, 2, 3, 4, 5, 6], [2, 6], [1, 3, 6], [4, 6]])
def test_several_stages_compute_what_the_model_does(tmp_path, positions):
    graph = read_graph(residual(tmp_path / "m.onnx"))
    positions = [*positions[:-1], len(graph.layers)]
    known = all_tensors(graph, {"x": rows(3)})
    given = {name: known[name] for name in graph.crossing(positions[0])} or {"x": rows(3)}
    for number, path in enumerate(write_stages(graph, positions, tmp_path), 1):
        assert path.name == f"stage-{number}.onnx"
        session = new_session(path)
        names = [one.name for one in session.get_outputs()]
        feeds = {one.name: given[one.name] for one in session.get_inputs()}
        given |= dict(zip(names, session.run(None, feeds), strict=True))
    np.testing.assert_allclose(given["y"], known["y"], rtol=1e-6)


def test_shapes_that_neither_the_file_nor_onnx_knows(tmp_path):
    nodes = [node("Reshape", "x shape", "r"), node("Relu", "r", "y")]
    path = write(tmp_path / "m.onnx", nodes, ["x", value("shape", (2,), TensorProto.INT64)], [value("y", None)])
    graph = read_graph(path)
    (one,) = write_stages(graph, [1, 2], tmp_path)
    assert [info.name for info in new_session(one).get_inputs()] == ["r"]
    nodes = [helper.make_node("Foreign", ["x"], ["r"], domain="no.where"), node("Relu", "r", "y")]
    graph = read_graph(write(tmp_path / "f.onnx", nodes, ["x"], ["y"]))
    with pytest.raises(ConfigError, match=r"the shape of tensor 'r' is not known; cut f.onnx at another one"):
        write_stages(graph, [1, 2], tmp_path)
