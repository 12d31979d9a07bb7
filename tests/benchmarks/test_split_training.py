"""The benchmark's own arithmetic, on one small model with a device in a process of its own."""

from __future__ import annotations

from benchmarks.split_training import EQUAL, _equality
from benchmarks.split_workloads import WORKLOADS


def test_a_training_in_parts_with_a_real_device_process_is_equal():
    row = _equality(WORKLOADS["decoder"], quick=True)
    assert row.met
    assert 0 <= row.ours <= EQUAL
    assert row.detail["largest step"] > 100 * EQUAL
    assert row.workload == "small decoder, U-shaped, 3 steps, fp32"
