"""The lease of a parent, as a table of events."""

from __future__ import annotations

import pytest

from edge_agent.link.lease import FIRST_S, Lease, LeasePolicy, ReturnPolicy
from edgefl.errors import ConfigError


def reached(policy=None):
    lease = Lease(policy or LeasePolicy(lease_s=30), 0)
    lease.reached(100)
    return lease


def test_a_parent_that_answers_is_kept_however_seldom_it_is_asked():
    assert not reached().is_over(10_000)


def test_a_parent_that_fails_is_kept_until_its_lease_is_over():
    lease = reached()
    lease.failed()
    assert not lease.is_over(129)
    assert lease.is_over(130)
    lease.reached(131)
    assert not lease.is_over(200)


def test_a_parent_that_was_never_reached_has_a_short_lease():
    lease = Lease(LeasePolicy(lease_s=30), 0)
    lease.failed()
    assert not lease.is_over(FIRST_S - 1)
    assert lease.is_over(FIRST_S)


def test_a_refusal_ends_the_lease_at_once():
    lease = reached()
    lease.failed(refused=True)
    assert lease.is_over(100)
    lease.begin(101)
    assert not lease.is_over(101)


def test_earlier_parents_are_probed_at_intervals():
    lease = reached()
    assert not lease.wants_probe(0, 1000)  # there is none
    assert lease.wants_probe(1, 130)
    lease.probed(130)
    assert not lease.wants_probe(1, 159)
    assert lease.wants_probe(1, 160)
    assert not reached(LeasePolicy(comes_back=ReturnPolicy.NEVER)).wants_probe(1, 1000)


@pytest.mark.parametrize(("policy", "busy"), [("idle", False), ("now", True)])
def test_when_a_device_comes_back(policy, busy):
    lease = reached(LeasePolicy(comes_back=ReturnPolicy(policy)))
    assert lease.may_return(is_idle=True)
    assert lease.may_return(is_idle=False) is busy


@pytest.mark.parametrize("lease_s", [0, -1, 1e6, float("nan")])
def test_a_lease_has_a_length(lease_s):
    with pytest.raises(ConfigError, match="--parent-lease-s"):
        LeasePolicy(lease_s=lease_s)
