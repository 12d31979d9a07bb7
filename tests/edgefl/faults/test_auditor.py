"""The auditor finds each kind of violation in logs made by hand, and none in a right one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import struct

import numpy as np
import pytest

from edgefl.faults.auditor import AuditedRun, audit, tensors


def file_of(values):
    array = np.array(values, "<f8")
    head = json.dumps({"w": {"dtype": "F64", "shape": [len(values)], "data_offsets": [0, array.nbytes]}}).encode()
    return struct.pack("<Q", len(head)) + head + array.tobytes()


def name_of(data):
    return hashlib.sha256(data).hexdigest()


FIRST = file_of([1.0, 2.0])
AFTER = file_of([3.0, 2.0])  # [1, 2] + ([4, 0] * 1 + [0, 0] * 1) / 2


def trained(device, update, at_s=1.0, base=FIRST, weight=1.0):
    asked = {"at_s": at_s, "device": device, "job": "j", "round": 1}
    return {"kind": "trained", **asked, "base": name_of(base), "weight": weight, "update": {"w": update}}


def acknowledged(device, by="cloud", at_s=2.0):
    return {"kind": "acknowledged", "at_s": at_s, "by": by, "device": device, "job": "j", "round": 1}


def outcome(**changes):
    return {
        "kind": "outcome", "at_s": 3.0, "job": "j", "round": 1, "model": name_of(AFTER), "admitted": ["a", "b"],
        "rejected": {}, "failed": {}, "missing": [], "weight": 2.0,
    } | changes  # fmt: skip


def run(*more, without=(), **changes):
    log = [trained("a", [4.0, 0.0]), acknowledged("a"), trained("b", [0.0, 0.0]), acknowledged("b", by="r1"), outcome()]
    log = [one for one in log if one["kind"] not in without] + list(more)
    right = AuditedRun(
        log=log, state="done", rounds=1, outcomes=[{"round": 1, "model": name_of(AFTER)}],
        models={name_of(AFTER): AFTER}, first=tensors(FIRST), first_name=name_of(FIRST), factor=1.0, ended_s=4.0,
        last_fault_s=0.0, last_short_fault_s=0.0, reaches=frozenset(), num_faults=0, waits_for_all=True,
        keeps_parents=True,
    )  # fmt: skip
    return dataclasses.replace(right, **changes)


def test_a_right_run_by_hand():
    assert audit(run()) == []


def test_a_gradient_moves_the_other_way():
    log = [trained("a", [-4.0, 0.0]), trained("b", [0.0, 0.0]), outcome()]
    assert audit(run(log=log, factor=-1.0)) == []
    assert "differs by 4" in audit(run(log=log))[0]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (run(ended_s=None), "the job did not end"),
        (run(state="failed"), "the job is failed"),
        (run(rounds=2), r"the rounds are \[1\], expected 1 to 2"),
        (run(problems=["1.0 s: a bug"]), "a bug"),
        (run(outcome(admitted=["a", "a"]), without=["outcome"]), "a is counted 2 times"),
        (run(outcome(admitted=["a", "b", "c"]), without=["outcome"]), "c contributed, but did not train on the model"),
        (run(outcome(admitted=["a"], weight=1.0), without=["outcome"]), "w differs by 2 from the weighted mean"),
        (run(outcome(weight=3.0), without=["outcome"]), "the weight is 3.0, expected 2.0"),
        (run(without=["outcome"]), "nobody computed the model"),
        (run(log=[trained("a", [4.0, 0.0], base=AFTER), trained("b", [0.0, 0.0]), outcome()]), "a contributed, but"),
        (run(acknowledged("c")), "c's update was acknowledged by the cloud, and is lost"),
        (run(acknowledged("c", by="r1")), "acknowledged by r1, and nobody names it"),
        (run(acknowledged("c", by="cloud", at_s=3.5)), "acknowledged c's update after the round"),
        (run(trained("a", [4.0, 0.0], at_s=50.0)), "trains 46.0 s after the job's end"),
        (run(trained("a", [4.0, 0.0])), "a trained 2 times for round 1, with 0 faults"),
        (run({**acknowledged("a", at_s=2.5), "kind": "started"}), "a trained for round 1 again, 0.5 s after"),
        (run(models={name_of(AFTER): file_of([3.0, 2.1])}), "does not have the hash in its name"),
        (run(models={name_of(AFTER): file_of([3.0, 2.1])}), "w differs by 0.1 from"),
        (run(models={name_of(AFTER): file_of([3.0, np.nan])}), "w differs by nan from"),
    ],
)  # fmt: skip
def test_each_violation_is_found(wrong, why):
    found = audit(wrong)
    assert any(re.search(why, one) for one in found), found


def test_what_a_region_acknowledged_may_be_late_only_shortly_after_a_fault():
    late = outcome(missing=["c"], at_s=100.0)
    said = acknowledged("c", by="r1", at_s=50.0)
    assert audit(run(late, said, without=["outcome"], ended_s=101.0, last_fault_s=60.0, num_faults=1)) == []
    found = audit(run(late, said, without=["outcome"], ended_s=101.0, last_fault_s=30.0, num_faults=1))
    assert found == ["round 1: c's update was acknowledged by r1, and is late without a fault"]
    assert audit(run(late, said, without=["outcome"], ended_s=101.0, waits_for_all=False)) == []


def test_a_device_that_could_come_is_missed_only_by_a_round_that_began_before_all_was_well():
    second = outcome(round=2, model=name_of(FIRST), admitted=["b"], weight=1.0, missing=["a", "c"], at_s=300.0)
    back = {**trained("b", [-2.0, 0.0], at_s=250.0, base=AFTER), "round": 2}
    two = [{"round": 1, "model": name_of(AFTER)}, {"round": 2, "model": name_of(FIRST)}]
    log = [trained("a", [4.0, 0.0]), trained("b", [0.0, 0.0]), outcome(at_s=100.0), back, second]
    changes = {
        "log": log, "outcomes": two, "rounds": 2, "ended_s": 301.0, "num_faults": 1, "reaches": {"a"},
        "models": {name_of(AFTER): AFTER, name_of(FIRST): FIRST},
    }  # fmt: skip
    assert audit(run(**changes, last_short_fault_s=50.0)) == []
    assert audit(run(**changes, last_short_fault_s=30.0, waits_for_all=False)) == []
    found = audit(run(**changes, last_short_fault_s=30.0))
    assert found == ["round 2: a is missing, though it knows a parent that is there"]


def test_a_refused_update_is_no_loss():
    assert audit(run(outcome(failed={"c": "why"}), acknowledged("c"), without=["outcome"])) == []


def test_an_outcome_that_a_kill_undid_does_not_matter():
    assert audit(run(outcome(model="0" * 64, admitted=["a"], at_s=2.9))) == []


def regional(update, model=None, **changes):
    """Return a run of one round with two regional ones: a and b, then a alone."""
    one = [2.0, 4.0]  # [1, 2] + ([2, 0] + [0, 4]) / 2
    log = [
        {**trained("a", [2.0, 0.0]), "kind": "started", "base_values": {"w": [1.0, 2.0]}}, trained("a", [2.0, 0.0]),
        trained("b", [0.0, 4.0]), acknowledged("a", by="r1"), acknowledged("b", by="r1"),
        {**trained("a", update, base=file_of(one)), "kind": "started", "round": 2, "base_values": {"w": one}},
        {**trained("a", update, base=file_of(one)), "round": 2}, {**acknowledged("a", by="r1"), "round": 2},
        outcome(admitted=["a"], missing=["b"], weight=1.0),
    ]  # fmt: skip
    return run(log=log, region_rounds=2, models={name_of(AFTER): model or AFTER}, **changes)


def test_regional_rounds_by_hand():
    right = regional([1.0, -2.0])  # [2, 4] + [1, -2] = [3, 2]
    assert audit(right) == []
    log = [*right.log[:-1], outcome(admitted=["b"], weight=1.0)]
    assert "b contributed, but did not train on a region's model" in audit(dataclasses.replace(right, log=log))[0]
    log = [*right.log[:-1], outcome(admitted=["a"], missing=["b"], weight=2.0)]
    assert "the weight is 2.0, expected 1.0" in audit(dataclasses.replace(right, log=log))[0]
    assert "the model differs by 0.25 from the mean of its regions" in audit(regional([2.0, -2.0]))[0]
    late = {**acknowledged("b", by="r1"), "round": 2}
    assert "b's update was acknowledged by r1, and is late" in audit(
        dataclasses.replace(right, log=[*right.log, late], last_fault_s=-100.0)
    )[0]  # fmt: skip
    lost = {**acknowledged("c", by="r1"), "round": 1}
    assert (
        "c's update of round 1 is in no region's model" in audit(dataclasses.replace(right, log=[*right.log, lost]))[0]
    )
    assert audit(dataclasses.replace(right, log=[*right.log, lost], num_faults=1)) == []
