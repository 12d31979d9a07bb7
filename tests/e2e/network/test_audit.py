"""What the auditor of the network's tests sees, by hand, and each fault that it is there for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgefl.trees import write_tree
from tests.e2e.network.audit import faults_of, undisturbed

WEIGHTS = [2.0, 5.0, 3.0, 1.0, 4.0, 2.0]  # of the six devices in round 1: 17 together


@pytest.fixture
def told(tmp_path):
    """Write a run's result and its model, with changes; return what the auditor finds in them."""

    def write(*, round_changes=None, **tensors):
        expected, who = undisturbed(1)
        counts = {"round": 1, "admitted": 6, "rejected": 0, "failed": 0, "missing": 0, "reasons": {}}
        one = counts | {"metrics": {"train_who": who[0]}} | (round_changes or {})
        (tmp_path / "result").write_text(json.dumps({"rounds": [one]}))
        with (tmp_path / "model").open("wb") as file:
            write_tree(expected | tensors, file)
        return faults_of(tmp_path / "result", tmp_path / "model", 1)

    return write


def test_one_undisturbed_round_by_hand(told):
    expected, who = undisturbed(1)
    np.testing.assert_allclose(expected["shares_d"], np.array(WEIGHTS) / 17)
    np.testing.assert_allclose(expected["follows"], (5 + 6 + 3 + 16 + 10) / 2 / 17)  # half of device * weight
    assert who == [(2 + 10 + 12 + 8 + 64 + 64) / 17]
    assert told() == []


def test_a_device_that_was_counted_twice_is_seen(told):
    [fault] = told(shares_d=(np.array(WEIGHTS) + np.eye(6)[1] * 5) / 22)
    assert fault.startswith("tensor shares_d")


def test_an_answer_to_another_round_is_seen(told):
    [fault] = told(drawn=np.random.default_rng([0, 2]).normal(size=4).astype(np.float32))
    assert fault.startswith("tensor drawn")


def test_a_round_that_lacks_a_device_or_counted_others_is_seen(told):
    assert told(round_changes={"admitted": 5, "missing": 1})[0].startswith("round 1: {'admitted': 5")
    assert told(round_changes={"metrics": {"train_who": 9.0}}) == ["round 1: others were counted, train_who 9.0"]
    assert told(round_changes={"round": 2})[0] == "it has 1 rounds"
