"""What engines share: when sums may stand for clients, what is counted, and whose threads those are."""

import dataclasses

import pytest
import torch

from edgefl.records import Failure, Partial, Traffic, Update
from edgefl.simulation.engines.fleets import Meter, torch_threads
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
    for answer in answers(plan):
        meter.count(answer)
    size = encoded_bytes(plan.parameters)
    assert meter.traffic() == Traffic(up_bytes=3 * size, down_bytes=4 * size)


def test_what_is_frozen_is_counted_once_a_client(set_up, plan_of):
    plan, served = plan_of(set_up("half")), set()
    size, frozen = encoded_bytes(plan.parameters), encoded_bytes(plan.frozen)
    for number, fetching in ((1, 4), (2, 0)):
        meter = Meter(served)
        meter.begin(dataclasses.replace(plan, round=number))
        for answer in answers(plan):
            meter.count(answer)
        assert meter.traffic() == Traffic(up_bytes=3 * size, down_bytes=4 * size + fetching * frozen)
    meter.begin(dataclasses.replace(plan, job="another"))
    meter.count(answers(plan)[0])
    assert meter.traffic().down_bytes == 5 * size + frozen


def answers(plan):
    """One alone, two in a sum, one that failed."""
    alone, *summed, failed = plan.clients[:4]
    return [
        Update(job=plan.job, round=1, device=alone, tree={}, weight=1.0),
        Partial(total={}, weight=2.0, contributors=tuple(summed)),
        Failure(job=plan.job, round=1, device=failed, reason="-"),
    ]


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
