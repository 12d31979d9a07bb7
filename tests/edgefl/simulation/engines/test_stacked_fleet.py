"""The engine: what it begins, and what it refuses. What it computes is held in test_stacked."""

import pytest

from edgefl import aggregation
from edgefl.aggregation import WeightedMean
from edgefl.errors import ConfigError
from edgefl.simulation.engines.stacked_fleet import StackedFleet


def test_no_stack_is_begun_after_a_stop(set_up, plan_of):
    setup = set_up()
    setup.stop.set()
    assert list(StackedFleet(setup).collect(plan_of(setup))) == []


def test_a_rule_that_does_not_merge_is_given_single_updates(set_up, plan_of, monkeypatch):
    class Single(WeightedMean):
        merges = False

    monkeypatch.setitem(aggregation.RULES, "mean", Single)
    setup = set_up()
    answers = list(StackedFleet(setup).collect(plan_of(setup)))
    assert sorted(one.device for one in answers) == sorted(setup.population.names())


def test_what_cannot_be_stacked_is_refused(set_up):
    with pytest.raises(ConfigError, match="'stacked' cannot run task 'small': its layer '1' is dropout"):
        StackedFleet(set_up("dropout"))
