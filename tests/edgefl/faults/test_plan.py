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


def test_a_plan_with_other_faults_is_otherwise_the_same():
    settings = next(one for one in map(draw, range(100)) if len(one.faults) > 2)
    left = settings.without(settings.faults[1:])
    assert left.faults == settings.faults[1:]
    assert left.without(settings.faults) == settings
