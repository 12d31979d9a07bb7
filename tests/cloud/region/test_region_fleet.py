"""What a region's devices are asked: the parent's round, or one of several regional ones."""

from __future__ import annotations

import dataclasses

from cloud.region.region_fleet import in_region, plan_of
from edgefl.protocols.messages import Evaluate
from edgefl.protocols.tiers import Work
from tests.cloud.dataplane.rounds import opened

FIT = dataclasses.replace(opened(number=2).assignment, evaluate=True)
EVALUATE = Evaluate(
    job="job", round=3, model=FIT.model, model_blake3="00", bundle=FIT.bundle, seed=4, workers=0, deadline_s=1.0,
    max_update_bytes=10,
)  # fmt: skip


def test_one_round_is_the_parents():
    work = Work(fit=FIT, devices=["a"], offline_grace_s=1.0)
    assert in_region(work, 2, 0, 9.0) is work


def test_of_several_each_has_its_number_and_deadline_and_the_first_evaluates():
    work = Work(fit=FIT, devices=["a"], offline_grace_s=1.0, region_rounds=3)
    asked = [in_region(work, 2, one, 9.0 + one).fit for one in range(3)]
    assert [(one.round, one.deadline_s, one.evaluate) for one in asked] == [
        (4, 9.0, True), (5, 10.0, False), (6, 11.0, False),
    ]  # fmt: skip
    plan = plan_of(asked[1], ("a",), {})
    assert (plan.round, plan.fit, plan.evaluate, plan.clients) == (5, True, False, ("a",))


def test_an_evaluation_has_the_first_number_of_its_round():
    work = Work(evaluate=EVALUATE, devices=["a"], offline_grace_s=1.0, region_rounds=3)
    asked = in_region(work, 3, 0, 9.0)
    assert (asked.evaluate.round, asked.fit) == (7, None)
    plan = plan_of(asked.evaluate, ("a",), {})
    assert (plan.fit, plan.evaluate, plan.train.seed) == (False, True, 4)
