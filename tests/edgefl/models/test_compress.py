"""int8 under the gate: smaller, as good, and no file where it is not."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgefl.errors import AccuracyGateFailed, ConfigError
from edgefl.models.compress import compress
from edgefl.models.gate import accuracy_of

CLASSES, FEATURES, WIDTH = 4, 16, 128


def dense_model(path, width=WIDTH):
    """Two dense layers that give the class of a one-hot corner: right by construction."""
    rng = np.random.default_rng(0)
    up = rng.normal(size=(FEATURES, width)).astype(np.float32)
    down = np.linalg.pinv(up)[:, :CLASSES].astype(np.float32)
    nodes = [helper.make_node("MatMul", ["input", "up"], ["h"]), helper.make_node("MatMul", ["h", "down"], ["output"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(up, "up"), numpy_helper.from_array(down, "down")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def samples():
    rng = np.random.default_rng(1)
    targets = rng.integers(0, CLASSES, 100)
    inputs = rng.normal(scale=0.1, size=(100, FEATURES)).astype(np.float32)
    inputs[np.arange(100), targets] += 1
    return inputs, targets


def test_int8_is_smaller_and_as_good(tmp_path, samples, capfd):
    source, target = dense_model(tmp_path / "m.onnx"), tmp_path / "m.int8.onnx"
    report = compress(
        source, target, calibration=samples[0], evaluate=lambda path: accuracy_of(path, *samples), max_drop=0.01
    )
    assert (report.accuracy_before, report.drop) == (1.0, report.accuracy_before - report.accuracy_after)
    assert report.drop <= 0.01
    assert report.source_bytes == source.stat().st_size
    assert report.target_bytes == target.stat().st_size < 0.5 * report.source_bytes
    assert 0 < report.seconds < 60
    kinds = {node.op_type for node in onnx.load(target).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.int8.onnx", "m.onnx"]
    assert capfd.readouterr() == ("", "")


def test_a_tiny_model_is_compressed_though_it_gains_nothing(tmp_path, samples):
    source = dense_model(tmp_path / "m.onnx", width=FEATURES)
    report = compress(source, tmp_path / "q.onnx", calibration=samples[0][:1], evaluate=lambda _: 1.0, max_drop=0.0)
    assert report.target_bytes == (tmp_path / "q.onnx").stat().st_size


def test_a_model_whose_shapes_cannot_be_inferred_again(tmp_path):
    """ONNX Runtime's symbolic shape inference raises a TypeError at the Squeeze after adaptive max pooling."""
    import torch
    from torch import nn

    from edgefl.models.export import export_onnx

    inputs = torch.arange(4 * 3 * 16, dtype=torch.float32).reshape(4, 3, 16) / 192
    model = nn.Sequential(nn.Conv1d(3, 32, 3), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(32, 2))
    export_onnx(model, inputs, tmp_path / "m.onnx")
    compress(tmp_path / "m.onnx", tmp_path / "q.onnx", calibration=inputs.numpy(), evaluate=lambda _: 1.0, max_drop=0.0)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}


@pytest.mark.parametrize("after", [0.90, float("nan")])
def test_the_gate_says_the_numbers_and_leaves_no_file(tmp_path, samples, after):
    source = dense_model(tmp_path / "m.onnx")
    with pytest.raises(AccuracyGateFailed, match=rf"from 0.9700 to {after:.4f} in int8, by .*; allowed: 0.01"):
        compress(
            source,
            tmp_path / "q.onnx",
            calibration=samples[0],
            evaluate=lambda path: 0.97 if path == source else after,
            max_drop=0.01,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_drop_of_just_what_is_allowed_passes(tmp_path, samples):
    source = dense_model(tmp_path / "m.onnx")
    report = compress(
        source,
        tmp_path / "q.onnx",
        calibration=samples[0],
        evaluate=lambda path: 0.97 if path == source else 0.96,
        max_drop=0.01,
    )
    assert report.drop == pytest.approx(0.01)


def test_options_that_make_no_sense(tmp_path, samples):
    source = dense_model(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="at least one calibration input"):
        compress(source, tmp_path / "q", calibration=samples[0][:0], evaluate=lambda _: 1.0, max_drop=0.1)
    with pytest.raises(ConfigError, match="--max-drop 2 must be"):
        compress(source, tmp_path / "q", calibration=samples[0], evaluate=lambda _: 1.0, max_drop=2)


def test_a_source_that_is_no_model(tmp_path, samples):
    (tmp_path / "m.onnx").write_bytes(b"?")
    with pytest.raises(ConfigError, match="not a model"):
        compress(tmp_path / "m.onnx", tmp_path / "q", calibration=samples[0], evaluate=lambda _: 1.0, max_drop=0.1)


def test_integer_kernels_do_not_saturate_on_any_cpu(tmp_path):
    """Without VNNI, x86 adds pairs of 8-bit products in 16 bits: two of 255 * 127 are more than those hold."""
    import onnxruntime

    inputs = np.ones((100, FEATURES), np.float32)
    up, down = np.ones((FEATURES, WIDTH), np.float32), np.ones((WIDTH, CLASSES), np.float32)
    source, target = dense_model(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    model = onnx.load(source)
    del model.graph.initializer[:]
    model.graph.initializer.extend([numpy_helper.from_array(up, "up"), numpy_helper.from_array(down, "down")])
    onnx.save(model, source)
    compress(source, target, calibration=inputs, evaluate=lambda _: 1.0, max_drop=0.0)
    in_floats = onnxruntime.SessionOptions()
    in_floats.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    by_integers, by_floats = (
        onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"]).run(
            None, {"input": inputs}
        )[0]
        for options in (onnxruntime.SessionOptions(), in_floats)
    )
    np.testing.assert_allclose(by_floats, FEATURES * WIDTH, rtol=0.01)
    np.testing.assert_allclose(by_integers, by_floats, rtol=0.01)
