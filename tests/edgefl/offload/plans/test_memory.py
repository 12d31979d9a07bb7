"""A head's memory by hand, and against a simulation that runs each head by itself."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefl.offload.graph import Layer, ModelGraph, read_graph
from edgefl.offload.plans.memory import head_bytes, peak_activations
from tests.edgefl.offload.graphs import residual


def test_the_residual_by_hand(tmp_path):
    """x = 1 (needed to the end), xa = 10, h = 100, hb = 1000, sum = 10, last = 10, y = 1."""
    graph = read_graph(residual(tmp_path / "m.onnx"))
    sizes = {"x": 1, "xa": 10, "h": 100, "hb": 1000, "sum": 10, "last": 10, "y": 1}
    assert peak_activations(graph, sizes) == [0, 11, 111, 1101, 1111, 1111, 1111]
    assert head_bytes(graph, sizes, [0, 64, 64, 128, 128, 128, 128]) == [0, 75, 175, 1229, 1239, 1239, 1239]


@st.composite
def graphs(draw):
    """A model of random layers, each of which reads one or two earlier tensors."""
    names, layers = ["in0", "in1"], []
    for at in range(draw(st.integers(2, 8))):
        reads = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)))
        writes = tuple(f"t{at}{part}" for part in range(draw(st.integers(1, 2))))
        layers.append(Layer(f"l{at}", "Op", reads, writes, None))
        names += writes
    outputs = tuple(draw(st.lists(st.sampled_from(names[2:]), min_size=1, max_size=2, unique=True)))
    sizes = {name: draw(st.integers(0, 9)) for name in names}
    return ModelGraph(None, None, tuple(layers), {}, {}, ("in0", "in1"), outputs, has_external_data=False), sizes


@settings(max_examples=80)
@given(graphs())
def test_one_pass_equals_running_each_head(made):
    graph, sizes = made
    assert peak_activations(graph, sizes) == [_simulated(graph, sizes, at) for at in range(len(graph.layers) + 1)]


def _simulated(graph, sizes, num_head):
    """Run a head layer by layer, and free what nobody reads any more."""
    kept = {*graph.crossing(num_head), *graph.outputs}
    alive, most = set(), 0
    if num_head:
        alive = {name for name in graph.inputs if any(name in one.reads for one in graph.layers)}
    for at, layer in enumerate(graph.layers[:num_head]):
        alive |= set(layer.writes)
        most = max(most, sum(sizes[name] for name in alive))
        later = {name for one in graph.layers[at + 1 : num_head] for name in one.reads}
        alive = {name for name in alive if name in later or name in kept}
    return int(np.int64(most))
