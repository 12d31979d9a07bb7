"""Floating-point types: how exact they are, and weights in bfloat16."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgefl.models.dtypes import array_for_file, computable, is_in_bfloat16, keep_bfloat16, other_floats, tolerance_of
from edgefl.models.session import open_session


def test_the_least_exact_type_gives_the_tolerance():
    linear = nn.Linear(2, 2)
    assert tolerance_of(linear) == tolerance_of(nn.ReLU()) == 1e-4
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    assert (tolerance_of(mixed), other_floats(mixed), other_floats(linear)) == (1e-2, "float16", "")
    assert tolerance_of(nn.Linear(2, 2).double()) == 1e-8
    assert tolerance_of(nn.Linear(2, 2).bfloat16()) == 5e-2


def test_only_bfloat16_is_computed_in_another_type():
    half = nn.Linear(2, 2).bfloat16()
    assert is_in_bfloat16(half)
    assert computable(half).weight.dtype == torch.float32
    assert half.weight.dtype == torch.bfloat16
    double = nn.Linear(2, 2).double()
    assert computable(double) is double
    assert array_for_file(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert array_for_file(torch.ones(2, dtype=torch.float16)).dtype == np.float16


@pytest.mark.parametrize("values", [np.arange(100, dtype=np.float32), np.linspace(0, 1, 100, dtype=np.float32)])
def test_weights_are_stored_in_half_if_no_value_changes(tmp_path, values):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 100]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [numpy_helper.from_array(values, "w")]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m")
    keep_bfloat16(tmp_path / "m")
    [weight] = onnx.load(tmp_path / "m").graph.initializer
    assert (weight.data_type == TensorProto.BFLOAT16) == float(values[1]).is_integer()
    [output] = open_session(tmp_path / "m").run(None, {"x": np.zeros((1, 100), np.float32)})
    assert output[0].tolist() == values.tolist()
