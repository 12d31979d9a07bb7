"""Descriptors are shared out within the limit, and too few are refused with what to do."""

import pytest

from cloud.shares import LEAST, Shares
from edgefl.errors import HostError
from edgefl.protocols.ports.connections import MAX_LEAVING


@pytest.mark.parametrize("builtin", [True, False])
@pytest.mark.parametrize("limit", [LEAST, 512, 1024, 4096, 20_000, 1 << 20])
def test_by_law_the_shares_are_within_the_limit(limit, builtin):
    shares = Shares.of(limit, builtin_broker=builtin)
    ports = 2 if builtin else 1
    of_devices = ports * (shares.devices.limits().max_open + MAX_LEAVING)
    assert shares.files + shares.http + of_devices <= limit
    assert min(shares.files, shares.http, shares.devices.seats, shares.devices.waiting) > 0
    assert 4 <= shares.transfers <= shares.files // 4


def test_by_hand():
    small, usual = Shares.of(512, builtin_broker=True), Shares.of(20_000, builtin_broker=True)
    assert (small.files, small.http, small.devices.seats, small.devices.waiting) == (128, 64, 96, 32)
    assert (usual.files, usual.http, usual.devices.seats, usual.devices.waiting) == (512, 1000, 8956, 256)
    assert Shares.of(1024, builtin_broker=False).devices.seats == 456
    assert "96 devices" in small.full()
    assert "limit of 512 open files" in small.full()


def test_a_limit_that_is_too_low_is_refused_at_the_start():
    with pytest.raises(HostError, match=r"may open 100 files .* LimitNOFILE"):
        Shares.of(100, builtin_broker=True)
