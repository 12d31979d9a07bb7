"""Loading models, and what does not load."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent import sessions
from edge_agent.sessions import Models, TensorInfo, load
from edgefl.errors import ProtocolError


@pytest.fixture
def path(tmp_path, onnx_model):
    (tmp_path / "model.onnx").write_bytes(onnx_model())
    return tmp_path / "model.onnx"


def test_a_model_is_described_and_runs(path):
    served = load("affine", 4, path)
    assert served.inputs == (TensorInfo("x", "FP32", (-1, 3)),)
    assert served.outputs == (TensorInfo("y", "FP32", (-1, 3)),)
    [y] = served.run(["y"], {"x": np.ones((2, 3), np.float32)})
    assert y.tolist() == [[3.0] * 3] * 2
    assert served.inline


def test_a_slow_model_is_not_for_the_event_loop(path, monkeypatch):
    monkeypatch.setattr(sessions, "INLINE_S", 0.0)
    assert not load("affine", 4, path).inline


@pytest.mark.parametrize("damage", [b"", b"no onnx", None])
def test_what_does_not_load_says_so(path, damage):
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(ProtocolError, match="model affine version 4 does not load"):
        load("affine", 4, path)


def test_values_that_a_model_cannot_take(path):
    served = load("affine", 4, path)
    with pytest.raises(ProtocolError, match="cannot take this"):
        served.run(["y"], {"x": np.ones((2, 2), np.float32)})


def test_a_model_with_strings_is_refused(tmp_path):
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(name, TensorProto.STRING, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "m").write_bytes(model.SerializeToString())
    with pytest.raises(ProtocolError, match=r"'x' of type tensor\(string\); served are: BOOL"):
        load("names", 1, tmp_path / "m")


def test_a_version_takes_the_place_of_the_one_before(path):
    models = Models()
    models.put(load("affine", 1, path))
    models.put(load("affine", 2, path))
    assert models.versions() == {"affine": 2}
    assert models.get("other") is None
