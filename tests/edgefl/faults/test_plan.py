"""A seed's plan is data, always the same, and together the seeds have every kind of fault."""

from __future__ import annotations

import json

from edgefl.faults.fleet import TOPOLOGIES
from edgefl.faults.plan import HORIZON_S, draw


def test_a_seed_always_draws_the_same():
    assert [draw(seed) for seed in range(50)] == [draw(seed) for seed in range(50)]


def test_all_kinds_all_topologies_and_only_nodes_that_exist():
    kinds, topologies = set(), set()
    for seed in range(300):
        settings = draw(seed)
        nodes = {"", *settings.fleet.servers, *settings.fleet.devices}
        topologies.add(settings.topology)
        for fault in settings.faults:
            kinds.add(fault.kind)
            assert 0 <= fault.at_s <= HORIZON_S
            assert {fault.node, *fault.other.split(",")} <= nodes
        json.dumps(settings.as_json())
    assert topologies == {*TOPOLOGIES}
    assert kinds == {
        "kill", "power", "kill-before-commit", "kill-after-commit", "cut", "break", "pause", "clock", "full", "assign",
        "gone",
        "apart",
    }  # fmt: skip


def test_some_seeds_have_regional_rounds_and_their_devices_stay_below_regions():
    """A round whose only device is given to the cloud would have nobody."""
    found = [one for one in map(draw, range(400)) if one.region_rounds > 1]
    assert {one.region_rounds for one in found} == {2, 3}
    assert all(one.fleet.regions and one.algorithm == "fedavg" and one.quorum == 1 for one in found)
    parents = [fault.other.split(",") for one in found for fault in one.faults if fault.kind == "assign"]
    assert parents
    assert all(each and "cloud" not in each for each in parents)


def test_a_plan_with_other_faults_is_otherwise_the_same():
    settings = next(one for one in map(draw, range(100)) if len(one.faults) > 2)
    left = settings.without(settings.faults[1:])
    assert left.faults == settings.faults[1:]
    assert left.without(settings.faults) == settings


def test_no_plan_takes_longer_than_a_round_waits() -> None:
    """A region that is gone, and then one that is cut off, would keep devices from the cloud for 500 s of 400 s."""
    kinds = [{one.kind for one in draw(seed).faults} for seed in range(1000)]
    assert any("gone" in one for one in kinds)
    assert any("apart" in one for one in kinds)
    assert not any({"gone", "apart"} <= one for one in kinds)
