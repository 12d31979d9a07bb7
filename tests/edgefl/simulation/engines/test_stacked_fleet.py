"""The engine: what it begins, and what it refuses. What it computes is held in test_stacked."""

import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.engines.stacked_fleet import StackedFleet


def test_no_stack_is_begun_after_a_stop(set_up, plan_of):
    setup = set_up()
    setup.stop.set()
    assert list(StackedFleet(setup).collect(plan_of(setup))) == []


def test_what_cannot_be_stacked_is_refused(set_up):
    with pytest.raises(ConfigError, match="'stacked' cannot run task 'small': its layer '1' is dropout"):
        StackedFleet(set_up("dropout"))
