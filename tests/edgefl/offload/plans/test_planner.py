"""The scan against brute force over every option; objectives and limits by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefl.errors import ConfigError
from edgefl.offload.plans.link import LinkSpeed
from edgefl.offload.plans.planner import (
    ALL_CLOUD,
    ALL_DEVICE,
    LEAVES,
    OBJECTIVES,
    PlanLimits,
    SplitOption,
    predict,
    ranked,
)

DEVICE_MS, CLOUD_MS = (10.0, 20.0, 30.0), (1.0, 2.0, 3.0)
LINK = LinkSpeed(up_mbps=8, down_mbps=16, rtt_ms=5)  # a kilobyte up in 1 ms, down in half of it


def option(num_head, up=0, down=0, memory=0, **more):
    ends = {0: (ALL_CLOUD, "inputs"), 3: (ALL_DEVICE, "nothing")}
    name, leaves = ends.get(num_head, (f"split:{num_head}", "activations"))
    given = {"form": "" if num_head == 3 else "fp32", "encode_ms": 0.0, "decode_ms": 0.0, "leaves": leaves} | more
    return SplitOption(name=name, num_head=num_head, up_bytes=up, down_bytes=down, device_bytes=memory, **given)


OPTIONS = [
    option(0, 40_000, 1000), option(1, 20_000, 1000, 10), option(2, 3000, 1000, 30, encode_ms=1, decode_ms=0.5),
    option(3, memory=60),
]  # fmt: skip


def test_costs_by_hand():
    found = predict(OPTIONS, DEVICE_MS, CLOUD_MS, LINK, encoding_factor=10)
    assert [one.device_ms for one in found] == [0, 10, 40, 60]
    assert [one.link_ms for one in found] == [45.5, 25.5, 8.5, 0]
    assert [one.cloud_ms for one in found] == [6, 5, 3.5, 0]
    assert [one.latency_ms for one in found] == [51.5, 40.5, 52, 60]
    assert [one.per_s for one in found] == [1e3 / 40.5, 1e3 / 20.5, 25, 1e3 / 60]


@pytest.mark.parametrize(
    ("objective", "limits", "best"),
    [
        ("latency", {}, "split:1"),
        ("throughput", {}, "split:1"),
        ("memory", {}, ALL_CLOUD),
        ("cloud-cost", {}, ALL_DEVICE),
        ("cloud-cost", {"memory_bytes": 59}, "split:2"),
        ("cloud-cost", {"latency_ms": 51.9}, "split:1"),
        ("latency", {"may_leave": "nothing"}, ALL_DEVICE),
        ("memory", {"may_leave": "activations"}, "split:1"),
    ],
)
def test_objectives_and_limits_by_hand(objective, limits, best):
    found = predict(OPTIONS, DEVICE_MS, CLOUD_MS, LINK, encoding_factor=10)
    assert ranked(found, objective, PlanLimits(**limits))[0].option.name == best


def test_what_is_impossible_says_why():
    found = predict(OPTIONS, DEVICE_MS, CLOUD_MS, LINK)
    with pytest.raises(ConfigError, match=r"\(activations would leave; inputs would leave; memory\).* needs 0 bytes"):
        ranked(found, "latency", PlanLimits(memory_bytes=20, may_leave="nothing"))
    with pytest.raises(ConfigError, match="--objective 'speed' is not one of"):
        ranked(found, "speed", PlanLimits())
    with pytest.raises(ConfigError, match="--may-leave 'all' is not one of: nothing, activations, inputs"):
        PlanLimits(may_leave="all")


MS = st.floats(0, 1e4)


@settings(max_examples=200)
@given(st.data())
def test_the_scan_finds_what_brute_force_finds(data):
    num = data.draw(st.integers(1, 8))
    device, cloud = (data.draw(st.lists(MS, min_size=num, max_size=num)) for _ in range(2))
    link = LinkSpeed(up_mbps=data.draw(st.floats(0.1, 100)), down_mbps=data.draw(st.floats(0.1, 100)), rtt_ms=5)
    options = [
        SplitOption(
            name=f"{at} {form}", num_head=at, form=form if at < num else "", up_bytes=data.draw(st.integers(0, 10**6)),
            down_bytes=10, encode_ms=data.draw(MS), decode_ms=1, device_bytes=data.draw(st.integers(0, 100)),
            leaves=LEAVES[data.draw(st.integers(0, 2))],
        )
        for at in range(num + 1) for form in ("fp32", "int8")
    ]  # fmt: skip
    limits = PlanLimits(memory_bytes=data.draw(st.integers(0, 100)), may_leave=data.draw(st.sampled_from(LEAVES)))
    found = predict(options, device, cloud, link, encoding_factor=2)
    costs = {}
    for one, seen in zip(options, found, strict=True):
        latency = math.fsum(device[: one.num_head]) + math.fsum(cloud[one.num_head :]) + 2 * one.encode_ms + 1
        if one.form:
            latency += one.up_bytes * 8e-3 / link.up_mbps + 5 + one.down_bytes * 8e-3 / link.down_mbps
        assert math.isclose(seen.latency_ms, latency, rel_tol=1e-9)
        if one.device_bytes <= limits.memory_bytes and LEAVES.index(one.leaves) <= LEAVES.index(limits.may_leave):
            costs[one.name] = latency
    if not costs:
        with pytest.raises(ConfigError, match="no option is within the limits"):
            ranked(found, "latency", limits)
        return
    best = ranked(found, "latency", limits)
    assert math.isclose(best[0].latency_ms, min(costs.values()), rel_tol=1e-9)
    assert {one.option.name for one in best} == costs.keys()
    for objective, key in OBJECTIVES.items():
        order = [key(one) for one in ranked(found, objective, limits)]
        assert order == sorted(order)
