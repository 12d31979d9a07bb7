"""A token bucket, by hand and by a clock that is turned by hand."""

import pytest

from edgefl.errors import ConfigError
from edgefl.protocols.ports.pacing import Buckets, TokenBucket


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_a_burst_is_free_and_what_is_above_waits():
    clock = Clock()
    bucket = TokenBucket(10, 5, clock)
    assert [bucket.take() for _ in range(5)] == [0.0] * 5
    assert bucket.take() == pytest.approx(0.1)
    assert bucket.take(10) == pytest.approx(1.1)
    clock.now_s += 1.6
    assert bucket.idle()
    assert bucket.take(5) == 0.0
    assert not bucket.idle()


def test_by_law_no_more_than_rate_and_burst_passes_in_any_time():
    clock = Clock()
    bucket, passed = TokenBucket(50, 20, clock), 0
    for _ in range(1000):
        clock.now_s += bucket.take(3)
        passed += 3
        assert passed <= 20 + 50 * (clock.now_s - 100.0) + 3


@pytest.mark.parametrize(("per_s", "burst"), [(0, 1), (-1, 1), (1, -1)])
def test_a_bucket_that_gives_nothing_is_refused(per_s, burst):
    with pytest.raises(ConfigError, match="expected per_s above 0"):
        TokenBucket(per_s, burst, Clock())


def test_keys_beyond_memory_share_one_bucket_and_idle_ones_make_room():
    clock = Clock()
    buckets = Buckets(1, 0, clock, most=3)
    for number in range(100):
        buckets.of(f"made-up-{number}").take(10)
    assert len(buckets) <= 4
    assert buckets.of("another").take(0) > 100  # of all that share it
    clock.now_s += 10_000
    assert buckets.of("another").take(0) == 0.0
    assert len(buckets) <= 3
