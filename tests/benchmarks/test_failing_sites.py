"""Sites that fail: without failures nothing is lost, and what is lost with them is counted."""

import pytest

from benchmarks.failing_sites import Sites, goodput, run
from edgefl.config import RoundsConfig


def rounds(count=40, **changes):
    return RoundsConfig(**{"count": count, "quorum": 2, "evaluate_every": 0, "deadline_s": 600.0, **changes})


def test_without_failures_all_of_every_round_counts():
    work = run(Sites(count=4, down_s=0.0), rounds(quorum=4))
    assert (work.updates, work.up_share) == (160, 1.0)
    assert work.seconds == pytest.approx(40 * 62, rel=0.1)


def test_sites_are_down_as_long_as_they_should_be():
    work = run(Sites(count=32), rounds(100))
    assert work.up_share == pytest.approx(0.8, abs=0.06)


def test_the_same_seed_gives_the_same():
    assert goodput(Sites(), rounds(grace="auto")) == goodput(Sites(), rounds(grace="auto"))


def test_a_window_saves_what_unseen_failures_cost():
    unseen = Sites(noticed_s=90.0)
    waits, adapts = goodput(unseen, rounds(200))[0], goodput(unseen, rounds(200, grace="auto"))[0]
    assert waits < 0.9 < adapts <= 1.0


def test_late_updates_count_and_make_goodput_no_worse():
    for noticed_s in (0.0, 90.0):
        sites = Sites(noticed_s=noticed_s)
        refused, taken = (goodput(sites, rounds(200, grace="auto", late=late))[0] for late in ("refuse", "next"))
        assert refused < taken <= 1.0
