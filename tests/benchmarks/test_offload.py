"""The benchmark's own arithmetic, and one small model through it."""

from __future__ import annotations

import pytest

from benchmarks import offload
from benchmarks.offload import Parts, _rows
from edgefl.offload.plans.link import LinkSpeed
from edgefl.offload.plans.planner import SplitOption
from tests.edgefl.offload.graphs import node, value, weight, write

OPTION = SplitOption(name="split:x", num_head=1, form="fp32", up_bytes=0, down_bytes=0, encode_ms=0, decode_ms=0,
                     device_bytes=0, leaves="activations")  # fmt: skip


def test_the_parts_add_up_by_hand():
    parts = Parts(option=OPTION, head_ms=2, encode_ms=1, decode_ms=0.5, tail_ms=3, up_bytes=1000, down_bytes=500)
    link = LinkSpeed(up_mbps=8, down_mbps=4, rtt_ms=10)
    assert parts.total_ms(link) == 5 * 3 + 0.5 + 3 + 1 + 10 + 1


def test_a_row_for_each_link(tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "LINKS_MBPS", (50, 100))
    nodes = [node("MatMul", "x a", "h"), node("Relu", "h", "r"), node("MatMul", "r b", "y")]
    write(tmp_path / "model.onnx", nodes, [value("x", ("n", 64))], [value("y", ("n", 4))],
          [weight("a", 64, 8), weight("b", 8, 4)])  # fmt: skip
    rows = list(_rows("tiny", tmp_path, quick=True))
    assert [one.workload for one in rows] == [
        f"tiny, {mbps} Mbit/s, 10 ms, device 5x slower" for mbps in (50, 100)
    ]  # fmt: skip
    for row in rows:
        assert row.metric == "planned: all on the device"
        assert row.ours == pytest.approx(row.theirs, rel=0.9)
        assert row.detail["all in the cloud"] > 10  # ms, the round trip
