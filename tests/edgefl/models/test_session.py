"""Sessions and the accuracy of a file, on graphs written by hand."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgefl.errors import ConfigError, MissingExtra
from edgefl.models.session import accuracy_of, open_session


@pytest.fixture
def identity(tmp_path):
    """A model that returns its input, with names that are not ours."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    path = tmp_path / "identity.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_accuracy_by_hand(identity):
    inputs = np.eye(3, dtype=np.float32)
    assert accuracy_of(identity, inputs, np.array([0, 1, 0])) == pytest.approx(2 / 3)


def test_accuracy_over_many_batches(identity):
    targets = np.arange(1000) % 3
    inputs = np.eye(3, dtype=np.float32)[targets]
    targets[:250] = 5
    assert accuracy_of(identity, inputs, targets) == 0.75


def test_accuracy_needs_samples(identity):
    with pytest.raises(ConfigError, match="as many targets as inputs"):
        accuracy_of(identity, np.zeros((0, 3), np.float32), np.zeros(0))
    with pytest.raises(ConfigError, match="as many targets as inputs"):
        accuracy_of(identity, np.zeros((2, 3), np.float32), np.zeros(1))


def test_what_is_not_a_model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    for name in ("m.onnx", "missing.onnx"):
        with pytest.raises(ConfigError, match=f"{name} is not a model that ONNX Runtime can open"):
            open_session(tmp_path / name)


def test_onnxruntime_missing_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"\[agent\]"):
        open_session(tmp_path / "m.onnx")
