"""Places of readers: nothing that somebody still reads is pruned, and nobody's place is kept for ever."""

from cloud.state.followers import GRACE_S, Followers
from edgefl.testing import ManualClock


def make():
    clock = ManualClock()
    return clock, Followers(clock)


def test_without_readers_the_latest_are_kept():
    _, followers = make()
    assert followers.prunable("j", 5, 10) == 0
    assert followers.prunable("j", 1000, 10) == 990


def test_nothing_is_pruned_until_those_who_read_before_a_restart_had_time_to_be_back():
    clock, followers = make()
    followers.expect_back(["j"])
    clock.advance(GRACE_S - 1)
    assert followers.prunable("j", 1000, 10) == 0
    assert followers.prunable("new", 1000, 10) == 990
    clock.advance(1)
    assert followers.prunable("j", 1000, 10) == 990


def test_the_slowest_reader_keeps_what_it_has_not_read():
    _, followers = make()
    with followers.reading("j", 0) as slow, followers.reading("j", 0) as fast, followers.reading("other", 0):
        fast(1000)
        assert followers.prunable("j", 1000, 10) == 0
        slow(500)
        assert followers.prunable("j", 1000, 10) == 490
        slow(1000)
        assert followers.prunable("j", 1000, 10) == 990


def test_the_place_of_who_went_is_kept_for_a_while():
    clock, followers = make()
    with followers.reading("j", 100):
        pass
    assert followers.prunable("j", 1000, 10) == 90
    with followers.reading("j", 400):  # it is back
        clock.advance(GRACE_S + 1)
        assert followers.prunable("j", 1000, 10) == 390
    followers.forget("j")
    assert followers.prunable("j", 1000, 10) == 990
    assert not followers._seen
    assert not followers._left


def test_a_reader_goes_on_after_its_job_has_ended():
    followers = Followers(ManualClock())
    with followers.reading("j", 0) as confirm:
        followers.forget("j")
        confirm(3)  # the last rounds are still told
    assert followers.prunable("j", done=5, kept=1) == 4  # nobody's place is kept
    assert followers._left == followers._seen == {}


def test_the_readers_of_an_ended_job_leave_nothing():
    clock = ManualClock()
    followers = Followers(clock)
    followers.forget("j")
    for _ in range(100):
        with followers.reading("j", 0):
            clock.advance(GRACE_S / 10)
    assert len(followers._seen["j"]) == len(followers._left) <= 12
