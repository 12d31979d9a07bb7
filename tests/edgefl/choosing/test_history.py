"""What is learnt of devices, round by round."""

from __future__ import annotations

from edgefl.choosing.history import UNKNOWN, History, Participation
from edgefl.records import RoundOutcome, SeenUpdate


def outcome(number, seen, **others):
    facts = {
        "job": "j", "round": number, "parameters": {}, "admitted": tuple(seen), "rejected": {}, "failed": {},
        "missing": (), "weight": 1.0, "metrics": {}, "seconds": 1.0, "up_bytes": 0, "down_bytes": 0, "seen": seen,
    }  # fmt: skip
    return RoundOutcome(**facts | others)


def test_two_rounds_by_hand():
    history = History()
    history.note(outcome(1, {"a": SeenUpdate(weight=10.0, loss=2.0, seconds=3.0)}, failed={"b": "no data"}))
    changed = history.note(outcome(2, {"b": SeenUpdate(weight=4.0)}, admitted=("b",), missing=("a",)))
    assert changed == {
        "b": Participation(samples=4.0, rounds=1, asked=2, last_round=2),
        "a": Participation(samples=10.0, loss=2.0, duration_s=3.0, rounds=1, asked=2, last_round=1, failures=1),
    }
    assert history.facts("a", 4) == {
        "samples": 10.0, "loss": 2.0, "duration_s": 3.0, "failures": 1.0, "staleness": 2.0, "rounds": 1.0,
    }  # fmt: skip
    assert history.of("c") == UNKNOWN
    assert history.facts("c", 4)["staleness"] == 3.0


def test_a_device_in_a_partial_sum_keeps_what_was_known():
    history = History({"a": Participation(samples=10.0, loss=2.0)})
    history.note(outcome(5, {}, admitted=("a",)))
    assert history.of("a") == Participation(samples=10.0, loss=2.0, rounds=1, asked=1, last_round=5)


def test_it_survives_as_json():
    history = History({"a": Participation(samples=1.5, rounds=2), "b": Participation(failures=3)})
    assert History.from_json(history.as_json()).as_json() == history.as_json()
