"""Hysteresis: by hand, and as a law over random links."""

from __future__ import annotations

import random

import pytest

from edgefl.errors import ConfigError
from edgefl.offload.plans.link import LinkSpeed
from edgefl.offload.plans.planner import PlanLimits
from edgefl.offload.plans.replan import PlannedModel, Replanner, ReplanRules
from tests.edgefl.offload.plans.test_planner import CLOUD_MS, DEVICE_MS, OPTIONS

MODEL = PlannedModel(options=OPTIONS, device_ms=DEVICE_MS, cloud_ms=CLOUD_MS)
RULES = ReplanRules(margin=0.1, looks=3, rest_s=30)


def link(mbps):
    return LinkSpeed(up_mbps=mbps, down_mbps=mbps, rtt_ms=5)


def heads(replanner, looks):
    return [replanner.look(now_s, link(mbps)).num_head for now_s, mbps in looks]


def test_a_better_option_is_taken_after_three_looks_in_a_row():
    assert heads(Replanner(MODEL, RULES), [(0, 8), (40, 100), (41, 100), (42, 100), (43, 100)]) == [1, 1, 1, 0, 0]


def test_a_look_at_the_old_link_starts_the_count_again():
    looks = [(0, 8), (40, 100), (41, 100), (42, 8), (43, 100), (44, 100), (45, 100)]
    assert heads(Replanner(MODEL, RULES), looks) == [1, 1, 1, 1, 1, 1, 0]


def test_after_a_change_there_is_rest():
    looks = [(0, 8), (1, 100), (2, 100), (3, 100), (29, 100), (30, 100), (31, 0.1), (59, 0.1), (60, 0.1)]
    assert heads(Replanner(MODEL, RULES), looks) == [1, 1, 1, 1, 1, 0, 0, 0, 3]


def test_a_little_better_is_not_enough():
    """At 20 mbit the cloud alone takes 27.4 ms, the first cut 28.4 ms: that is less than a tenth."""
    replanner = Replanner(MODEL, ReplanRules(margin=0.1, looks=1, rest_s=0))
    assert replanner.look(0, link(9.6)).num_head == 1
    near = [one.latency_ms for one in MODEL.predictions(link(20))[:2]]
    assert near[0] < near[1] < near[0] / 0.9
    assert replanner.look(1, link(20)).num_head == 1
    assert Replanner(MODEL).look(0, link(20)).num_head == 0


def test_what_becomes_impossible_is_left_at_once():
    tight = PlannedModel(options=OPTIONS, device_ms=DEVICE_MS, cloud_ms=CLOUD_MS, limits=PlanLimits(latency_ms=50))
    replanner = Replanner(tight, RULES)
    assert replanner.look(0, link(8)).num_head == 1
    assert replanner.look(1, link(100), device_load=5).num_head == 0
    with pytest.raises(ConfigError, match="no option is within the limits"):
        replanner.look(2, link(0.1), device_load=5)
    assert replanner.current is not None
    assert replanner.current.num_head == 0


def test_a_busy_device_gives_away_and_a_busy_cloud_gives_back():
    assert Replanner(MODEL).look(0, link(8), device_load=20).num_head == 0
    assert Replanner(MODEL).look(0, link(8), cloud_load=40).num_head == 3


def test_a_noisy_link_changes_nothing_often():
    """Around a link at which two options cost the same, a plan without hysteresis changes at every other look."""
    noise = random.Random(0)
    links = [link(max(1.0, noise.gauss(17.9, 1.0))) for _ in range(500)]
    eager = [Replanner(MODEL).look(0, one).num_head for one in links]
    replanner = Replanner(MODEL, RULES)
    calm = [replanner.look(float(at), one).num_head for at, one in enumerate(links)]
    assert changes(eager) > 100
    assert changes(calm) == 0


def changes(found):
    return sum(one != other for one, other in zip(found, found[1:]))  # noqa: RUF007, B905 - pairs


def test_rules_out_of_range_are_refused():
    for rules in ({"margin": 1.0}, {"looks": 0}, {"rest_s": float("inf")}):
        with pytest.raises(ConfigError, match="margin must be in"):
            ReplanRules(**rules)
