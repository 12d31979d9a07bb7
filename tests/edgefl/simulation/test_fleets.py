"""What engines share: when sums may stand for clients, what is counted, and whose threads those are."""

import dataclasses

import pytest
import torch

from edgefl.records import Traffic
from edgefl.simulation.fleets import Meter, torch_threads
from edgefl.trees import encoded_bytes


@pytest.mark.parametrize(("wanted", "over", "sums"), [(0, 0.0, True), (8, 0.0, True), (4, 0.0, True), (4, 0.5, False)])
def test_sums_only_where_every_update_is_wanted(set_up, plan_of, wanted, over, sums):
    setup = set_up(rounds={"clients": wanted, "over_selection": over})
    asked = int((wanted or 8) * (1 + over))
    plan = plan_of(setup)
    assert setup.takes_sums(dataclasses.replace(plan, clients=plan.clients[:asked])) is sums


def test_a_meter_counts_encoded_trees(set_up, plan_of):
    plan, meter = plan_of(set_up()), Meter()
    meter.begin(plan)
    meter.count(down=3, up=2)
    meter.count(down=1, up=0)
    size = encoded_bytes(plan.parameters)
    assert meter.traffic() == Traffic(up_bytes=2 * size, down_bytes=4 * size)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
