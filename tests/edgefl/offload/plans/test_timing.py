"""Layers' times: measured, divided among what the optimiser fused, and read back on another machine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import helper

from edgefl.errors import ConfigError
from edgefl.offload.graph import read_graph
from edgefl.offload.plans import timing
from edgefl.offload.plans.timing import LayerTimes, as_json, device_times, measure_layers, median_ms, times_of_profile
from tests.edgefl.offload.graphs import node, residual, rows, value, weight, write


def heavy(path):
    """Two products, the second with a hundred times the work, then what the optimiser fuses or drops."""
    return write(
        path,
        [
            node("MatMul", "x a", "small"), node("MatMul", "small b", "large"), node("Identity", "large", "same"),
            node("Relu", "same", "h"), node("MatMul", "h c", "y"),
        ],
        [value("x", ("n", 8))], [value("y", ("n", 1))],
        [weight("a", 8, 512), weight("b", 512, 2048), weight("c", 2048, 1)],
    )  # fmt: skip


def test_a_layer_of_a_hundred_times_the_work_takes_most_of_the_time(tmp_path):
    graph = read_graph(heavy(tmp_path / "m.onnx"))
    times = measure_layers(graph, {"x": np.ones((64, 8), np.float32)}, "here", repeats=5, threads=1)
    assert len(times.layers_ms) == 5
    assert all(one >= 0 for one in times.layers_ms)
    assert times.layers_ms[1] == max(times.layers_ms)
    assert times.layers_ms[1] > sum(times.layers_ms) / 2


def test_models_with_external_weights_are_measured(tmp_path):
    graph = read_graph(residual(tmp_path / "m.onnx", external=True))
    times = measure_layers(graph, {"x": rows()}, "here", repeats=2)
    assert sum(times.layers_ms) > 0


def test_the_time_of_a_fused_node_is_divided_by_hand(tmp_path):
    """Layers 0 and 1 became one node, layer 2 vanished, and a node of another layout stands for no layer."""
    nodes = [node("MatMul", "x a", "p"), node("Relu", "p", "h"), node("Identity", "h", "i"), node("Tanh", "i", "y")]
    graph = read_graph(write(tmp_path / "m.onnx", nodes, ["x"], ["y"], [weight("a", 4, 4)]))
    fused = [
        helper.make_node("Fused", ["x", "a"], ["h"], name="fused"), helper.make_node("Tanh", ["h"], ["y"], name="t"),
        helper.make_node("Reorder", ["y"], ["made_up"], name="reorder"),
    ]  # fmt: skip
    alone, found = [3.0, 1.0, 0.0, 2.0], {"fused": 8.0, "t": 4.0, "reorder": 1.2}
    assert timing._shares(graph, alone, found, fused) == pytest.approx([6.6, 2.2, 0.0, 4.4])


def test_a_device_is_a_factor_or_a_file_of_the_same_model(tmp_path):
    graph, here = read_graph(residual(tmp_path / "m.onnx")), LayerTimes("here", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert device_times("2.5x", here, graph).layers_ms == (2.5, 5.0, 7.5, 10.0, 12.5, 15.0)
    file = tmp_path / "device.json"
    told = as_json(here.scaled(4, "cam-3"), graph)
    file.write_text(json.dumps(told))
    assert device_times(str(file), here, graph) == LayerTimes("cam-3", (4.0, 8.0, 12.0, 16.0, 20.0, 24.0))
    for wrong, words in (
        ({"model_sha256": "0" * 64}, "is of another model"),
        ({"format": 2}, "is of another model, or of another version"),
        ({"layers_ms": {}}, "is of another model"),
        ({"layers_ms": dict.fromkeys(told["layers_ms"], float("nan"))}, "negative or not finite"),
        ({"layers_ms": [1]}, "is no file of `edgefl offload profile"),
        ({"machine": None, "layers_ms": None}, "is no file of"),
    ):
        file.write_text(json.dumps(told | wrong))
        with pytest.raises(ConfigError, match=words):
            device_times(str(file), here, graph)
    with pytest.raises(ConfigError, match="--device cam-3: expected a factor such as 5x, or a file"):
        device_times("cam-3", here, graph)
    with pytest.raises(ConfigError, match="no device takes no time"):
        device_times("0x", here, graph)


def test_the_median_of_calls():
    calls = []
    assert median_ms(lambda: calls.append(1), 5) >= 0
    assert len(calls) == 5
    assert timing.machine_name().endswith("cores")


def test_times_of_a_device_from_those_of_its_heads():
    here = LayerTimes("here", (1.0, 1.0, 2.0, 4.0))
    found = times_of_profile({2: 10.0, 3: 14.0}, here, "device cam")
    assert found.layers_ms == pytest.approx((5.0, 5.0, 4.0, 4.0 * 14 / 4))
    assert times_of_profile({4: 80.0}, here, "device cam").layers_ms == pytest.approx((10.0, 10.0, 20.0, 40.0))
    with pytest.raises(ConfigError, match="device cam has measured no part of this model yet"):
        times_of_profile({0: 1.0}, here, "device cam")
