"""A model is tried before it is published as a device tries it: alone, and in words."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgefl.errors import ConfigError
from edgefl.models.acceptance import accept
from edgefl.models.sample import read_sample
from tests import onnx_models

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture
def tried(tmp_path):
    def run(content, *cases, within_s=60.0):
        (tmp_path / "m.onnx").write_bytes(content)
        found = accept(tmp_path / "m.onnx", tmp_path / "sample", cases, within_s=within_s)
        return found, read_sample(found.sample, "m")

    return run


def graph(nodes, inputs, outputs, **constants):
    """A model from nodes; inputs and outputs are name=(type, sizes)."""
    ends = [
        [helper.make_tensor_value_info(name, kind, sizes) for name, (kind, sizes) in side.items()]
        for side in (inputs, outputs)
    ]
    known = [helper.make_tensor(name, kind, sizes, values) for name, (kind, sizes, values) in constants.items()]
    made = helper.make_graph(nodes, "g", *ends, known)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def test_inputs_are_made_from_types_and_shapes_in_batches_of_1_and_3(tried):
    found, sample = tried(onnx_models.affine())
    assert (found.inputs, found.outputs, found.notes) == ({"x": "FP32[-1,3]"}, {"y": "FP32[-1,3]"}, [])
    assert [case.inputs["x"].shape for case in sample.cases] == [(1, 3), (3, 3)]
    for case in sample.cases:
        assert case.outputs["y"] == pytest.approx(case.inputs["x"] * 2 + 1)


def test_free_sizes_are_those_that_the_model_runs_with(tried):
    content = graph(
        [node("MatMul", "x w", "y")], {"x": (FLOAT, ["n", "features"])}, {"y": (FLOAT, ["n", 1])},
        w=(FLOAT, [30, 1], [1.0] * 30),
    )  # fmt: skip
    assert [case.inputs["x"].shape for case in tried(content)[1].cases] == [(1, 30), (3, 30)]


def test_a_state_has_its_rows_where_it_has_them(tried):
    content = graph(
        [node("ReduceSum", "state first", "sum", keepdims=0), node("Add", "x sum", "y")],
        {"x": (FLOAT, ["n", 4]), "state": (FLOAT, [2, "n", 4])},
        {"y": (FLOAT, ["n", 4])},
        first=(INT64, [1], [0]),
    )
    found, sample = tried(content)
    assert found.inputs == {"x": "FP32[-1,4]", "state": "FP32[2,-1,4]"}
    assert [case.inputs["state"].shape for case in sample.cases] == [(2, 1, 4), (2, 3, 4)]


def test_given_inputs_are_used_and_tried_in_other_batches(tried):
    given = np.arange(15, dtype=np.float32).reshape(5, 3)
    _, sample = tried(onnx_models.affine(), {"x": given})
    assert [case.inputs["x"].shape for case in sample.cases] == [(1, 3), (3, 3), (5, 3)]
    assert sample.cases[-1].outputs["y"].tolist() == (given * 2 + 1).tolist()


def test_a_model_that_takes_one_number_of_rows_says_so(tried):
    content = graph(
        [node("Add", "x two", "y")], {"x": (FLOAT, ["n", 2])}, {"y": (FLOAT, [2, 2])}, two=(FLOAT, [2, 2], [1.0] * 4)
    )
    found, sample = tried(content, {"x": np.zeros((2, 2), np.float32)})
    assert [case.inputs["x"].shape for case in sample.cases] == [(1, 2), (2, 2)]  # 1 broadcasts, 3 does not
    [note] = found.notes
    assert note.startswith("no sample of another number of rows: m.onnx does not run on x float32[3, 2]")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"z": np.zeros(1)}, r"the sample does not fit m\.onnx: it has the inputs z, the model takes x FP32\[-1,3\]"),
        ({"x": np.zeros((1, 4), np.float32)}, r"input 'x' is float32\[1, 4\], the model takes FP32\[-1,3\]"),
        ({"x": np.full((1, 3), np.nan, np.float32)}, r"output 'y' \[1, 3\] is not finite in 3 of 3 values"),
    ],
)
def test_a_sample_that_does_not_fit_or_gives_nan_is_refused(tried, given, said):
    with pytest.raises(ConfigError, match=said):
        tried(onnx_models.affine(), given)


def test_a_model_that_runs_on_nothing_that_can_be_made_needs_a_sample(tried):
    content = graph(
        [node("Gather", "table i", "y")], {"i": (INT64, ["n"])}, {"y": (FLOAT, ["n"])}, table=(FLOAT, [0], [])
    )
    with pytest.raises(ConfigError, match=r"--sample FILE\.npz with one array for each of: i INT64\[-1\]"):
        tried(content)


def test_types_that_devices_do_not_serve_are_refused_with_a_remedy(tried):
    names = graph([node("Identity", "x", "y")], {"x": (TensorProto.STRING, [1])}, {"y": (TensorProto.STRING, [1])})
    with pytest.raises(ConfigError, match=r"'x' of type tensor\(string\); expected: BOOL, .* encode texts as numbers"):
        tried(names)
    graph_of_maps = helper.make_graph(
        [helper.make_node("ZipMap", ["p"], ["m"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])],
        "g",
        [helper.make_tensor_value_info("p", FLOAT, [None, 2])],
        [helper.make_value_info("m", helper.make_sequence_type_proto(
            helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, []))))],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 1)]
    maps = helper.make_model(graph_of_maps, opset_imports=opsets, ir_version=10).SerializeToString()
    with pytest.raises(ConfigError, match=r"'m' of type seq\(map.*options=\{'zipmap': False\}"):
        tried(maps)


def test_a_crash_or_an_endless_run_ends_the_trial_alone(tried):
    with pytest.raises(ConfigError, match=r"m\.onnx cannot be served: .* was killed by SIGFPE"):
        tried(onnx_models.crash_at_start())
    with pytest.raises(ConfigError, match=r"m\.onnx was not loaded and run within 3 s"):
        tried(onnx_models.endless_start(), within_s=3.0)


def test_random_outputs_are_not_compared_and_that_is_said(tried):
    content = graph(
        [node("RandomNormalLike", "x", "noise"), node("Add", "x noise", "y"), node("Identity", "x", "z")],
        {"x": (FLOAT, ["n", 2])},
        {"y": (FLOAT, ["n", 2]), "z": (FLOAT, ["n", 2])},
    )
    found, sample = tried(content)
    assert sample.allowed == {"y": np.inf, "z": pytest.approx(1e-3)}
    assert found.notes == ["output 'y' is different in every run, so devices do not compare its values"]


def test_a_large_sample_has_the_first_case_only(tried, monkeypatch):
    content = graph([node("Identity", "x", "y")], {"x": (FLOAT, ["n", 1 << 20])}, {"y": (FLOAT, ["n", 1 << 20])})
    assert len(tried(content)[1].cases) == 1  # 8 MiB, and 24 for three rows
