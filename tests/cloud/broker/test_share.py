"""What one device may send, by a clock that is turned by hand."""

from __future__ import annotations

import pytest

from cloud.broker import share as share_module
from cloud.broker.share import Share
from edgefl.errors import ProtocolError
from edgefl.testing import ManualClock


@pytest.mark.parametrize("size", [2, 30_000])
def test_by_law_a_device_is_read_no_faster_than_its_share(size: int) -> None:
    clock = ManualClock()
    share = Share(clock)
    per_s = min(share_module.PACKETS_PER_S, share_module.BYTES_PER_S / size)
    burst = min(share_module.PACKETS_BURST, share_module.BYTES_BURST / size)
    for number in range(1, int(burst + 10 * per_s)):
        clock.advance(share.take(size))
        assert number <= burst + per_s * clock.now_s + 1
    assert clock.now_s > 9


def test_patience_ends_with_one_that_never_comes_below_its_share() -> None:
    clock = ManualClock()
    share = Share(clock)

    def flood() -> None:
        for _ in range(100_000):
            clock.now_s += share.take(2)

    with pytest.raises(ProtocolError, match="for 30 s it sent more than its share of 200 packets and 256 kB"):
        flood()
    assert 30 < clock.now_s < 31


def test_one_that_rests_in_between_is_kept() -> None:
    clock = ManualClock()
    share = Share(clock)
    for _ in range(20):
        for _ in range(2000):
            clock.now_s += share.take(2)
        clock.now_s += 10
    assert share.take(2) == 0.0
