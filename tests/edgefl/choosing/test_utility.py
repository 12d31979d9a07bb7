"""Draws by utility: useful, fast and fresh devices more often, failing ones less, and fairness as asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edgefl.choosing.history import History, Participation
from edgefl.choosing.utility import draw_by_utility, utilities_of


def known(**facts):
    return Participation(**{"samples": 10.0, "loss": 1.0, "duration_s": 1.0, "rounds": 1, "last_round": 1} | facts)


def draws(history, names, wanted, *, rounds=range(60, 260), fairness=0.0):
    counts = Counter()
    for number in rounds:
        rng = np.random.default_rng([0, number])
        drawn = draw_by_utility(names, wanted, history, round_number=number, fairness=fairness, rng=rng)
        assert len(set(drawn)) == wanted
        counts.update(drawn)
    return counts


def test_utilities_by_hand():
    devices = [
        known(samples=10.0, loss=2.0),
        known(samples=10.0, loss=1.0),
        known(loss=2.0, duration_s=1.0, failures=1),
    ]
    values = utilities_of(devices, 1, 0.0)  # ln(1) = 0: nothing is stale
    assert values.tolist() == pytest.approx([1.0, 0.0, 0.5])


def test_a_slow_device_counts_less_with_the_square():
    devices = [known(duration_s=1.0)] * 9 + [known(duration_s=10.0)]
    values = utilities_of(devices, 1, 0.0)
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(1.0 / 10.0**2)


def test_devices_that_teach_more_are_drawn_more_often():
    names = [f"d{at}" for at in range(10)]
    history = History({name: known(samples=float(10 + 10 * at)) for at, name in enumerate(names)})
    counts = draws(history, names, 3)
    assert counts["d9"] > counts["d0"]
    assert counts["d0"] == 0


def test_full_fairness_draws_those_that_took_part_least():
    names = [f"d{at}" for at in range(10)]
    history = History({name: known(rounds=at + 1, loss=float(at + 1)) for at, name in enumerate(names)})
    assert draws(history, names, 1, fairness=1.0).most_common(1)[0][0] == "d0"
    assert draws(history, names, 1, fairness=0.0).most_common(1)[0][0] in {"d8", "d9"}


def test_new_devices_are_explored_and_those_that_failed_come_last():
    names = [f"d{at}" for at in range(10)]
    failing = History({name: Participation(failures=3, asked=3) for name in names[:5]})
    assert draws(failing, names, 5).keys() == {*names[5:]}
    mixed = History({name: known() for name in names[:5]})
    first = draws(mixed, names, 5, rounds=[1])
    assert sum(first[name] for name in names[5:]) == 4  # 90% of 5 explore, rounded
    late = draws(mixed, names, 5, rounds=[500])
    assert sum(late[name] for name in names[5:]) == 1  # 20%


def test_every_device_is_drawn_if_no_more_are_there_and_odd_numbers_harm_nothing():
    rng = np.random.default_rng(0)
    odd = History({"a": known(loss=float("inf")), "b": known(loss=float("nan")), "c": known(samples=0.0, loss=-1.0)})
    assert set(draw_by_utility(["a", "b"], 5, odd, round_number=9, fairness=0.0, rng=rng)) == {"a", "b"}
    assert len(draw_by_utility(["a", "b", "c"], 2, odd, round_number=9, fairness=0.5, rng=rng)) == 2
