"""Plans of real models: limits, formats, gates, and what was measured replaces what was predicted."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.offload.graph import read_graph
from edgefl.offload.plans.link import parse_link
from edgefl.offload.plans.planner import ALL_CLOUD, ALL_DEVICE, PlanLimits
from edgefl.offload.plans.planning import MEASURED, Planner, Wish
from edgefl.offload.plans.timing import LayerTimes
from edgefl.offload.source import source_of_file
from tests.edgefl.offload.graphs import node, residual, value, weight, write

SLOW = parse_link("10kbit,1ms")


def planner(path, factor=5.0):
    """A planner with times that were not measured: a millisecond for each layer."""
    source, graph = source_of_file(path), read_graph(path)
    here = LayerTimes("here", (1.0,) * len(graph.layers))
    return Planner(graph, source, here, here.scaled(factor, "device"))


def funnel(path):
    """A wide input, one number in the middle, a large last layer."""
    nodes = [node("MatMul", "x a", "wide"), node("Relu", "wide", "h"), node("MatMul", "h b", "one"),
             node("Tanh", "one", "t"), node("MatMul", "t c", "y")]  # fmt: skip
    weights = [weight("a", 64, 64), weight("b", 64, 1), weight("c", 1, 50_000)]
    return write(path, nodes, [value("x", ("n", 64))], [value("y", ("n", 50_000))], weights)


def test_options_by_hand(tmp_path):
    made = planner(residual(tmp_path / "m.onnx"))
    names = [(one.name, one.form) for one in made.options]
    assert names[:2] == [(ALL_CLOUD, "fp32"), (ALL_CLOUD, "fp16")]
    assert names[-1] == (ALL_DEVICE, "")
    assert len(names) == 6 * 4 + 1
    first = made.options[4]
    assert (first.name, first.num_head, first.leaves) == ("split:MatMul_xa", 1, "inputs")
    assert first.up_bytes == 5 + (4 + 1 + 8) + (4 + 2 + 8) + 32
    assert first.down_bytes == 5 + (4 + 1 + 8) + 16
    assert first.device_bytes == 64 + 32  # a; x and xa
    assert made.slowdown == 5


def test_a_slow_link_sends_the_narrowest(tmp_path):
    made = planner(funnel(tmp_path / "m.onnx"))
    wish = Wish(link=parse_link("10kbit/1gbit,1ms"), limits=PlanLimits(memory_bytes=50_000))
    found = made.plan(wish)
    assert found.chosen.option.num_head in {3, 4}
    assert found.chosen.option.up_bytes < 30
    assert found.judged is not None
    assert found.judged.accepted
    assert found.chosen.option.num_head in found.measured
    assert len(found.measured) <= 2 * MEASURED
    cuts = found.best_of_each_cut("latency")
    assert [one.option.num_head for one in cuts] == list(range(6))
    assert found.chosen in cuts


def test_all_cuts_are_measured_if_wished_beside_what_was_predicted(tmp_path):
    made = planner(funnel(tmp_path / "m.onnx"))
    found = made.plan(Wish(link=SLOW, measures_all=True))
    assert found.measured == frozenset(range(6))
    by_layers = {(one.option.num_head, one.option.form): one.latency_ms for one in made.predictions(SLOW)}
    assert found.predicted_ms == by_layers
    assert any(one.latency_ms != by_layers[one.option.num_head, one.option.form] for one in found.options)


def test_all_on_the_device_and_all_in_the_cloud_are_candidates(tmp_path):
    made = planner(funnel(tmp_path / "m.onnx"))
    assert made.plan(Wish(link=SLOW)).chosen.option.name == ALL_DEVICE
    fast = made.plan(Wish(link=parse_link("1gbit,0ms"), objective="memory"))
    assert fast.chosen.option.name == ALL_CLOUD
    assert fast.chosen.device_ms >= 0


def test_limits_and_formats_are_kept(tmp_path):
    made = planner(funnel(tmp_path / "m.onnx"))
    found = made.plan(Wish(link=parse_link("1gbit,0ms"), objective="memory", formats=("fp16",),
                           limits=PlanLimits(may_leave="activations")))  # fmt: skip
    assert found.chosen.option.form == "fp16"
    assert found.chosen.option.num_head in {1, 2}  # as much memory
    assert {one.option.form for one in found.options} == {"fp16", ""}
    with pytest.raises(ConfigError, match="no option is within the limits"):
        made.plan(Wish(link=SLOW, limits=PlanLimits(memory_bytes=10, may_leave="activations")))


def test_a_format_that_the_gate_refuses_is_not_chosen(tmp_path):
    """The scores of two classes are almost equal: any rounding of x decides otherwise."""
    nodes = [node("Mul", "x thousand", "h"), node("Sub", "h base", "y")]
    base = np.full(4, 1000.0, np.float32)
    from onnx import numpy_helper

    weights = [numpy_helper.from_array(base, "thousand"), numpy_helper.from_array(base, "base")]
    path = write(tmp_path / "m.onnx", nodes, ["x"], ["y"], weights)
    made = planner(path)
    near = (1 + np.random.default_rng(0).normal(size=(100, 4)) * 1e-4).astype(np.float32)
    wish = Wish(link=parse_link("1kbit,0ms"), objective="memory", limits=PlanLimits(may_leave="activations"))
    found = made.plan(wish, [{"x": near}])
    assert found.chosen.option.form == "fp32"
    assert {form for at, form in found.refused if at == 1} == {"fp16", "bf16", "int8"}
    assert all(one.measure == "other decisions" for one in found.refused.values())


def test_each_cut_is_attacked(tmp_path):
    made = planner(funnel(tmp_path / "m.onnx"))
    told = []
    x = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    found = made.leaks({"x": x}, told.append)
    assert [one.num_head for one in told] == list(found) == [1, 2, 3, 4]
    assert found[1].value > 0.95  # an invertible product
    assert found[3].value < 0.3  # one number of 64
    assert found[1].value > found[2].value > found[3].value


def test_times_that_were_measured_are_used_again(tmp_path):
    made = planner(funnel(tmp_path / "m.onnx"))
    first = made.plan(Wish(link=SLOW))
    again = made.plan(Wish(link=SLOW))
    assert again.chosen == first.chosen
    assert made.plan(Wish(link=parse_link("1gbit,0ms"), objective="memory")).measured >= first.measured
