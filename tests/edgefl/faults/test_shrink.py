"""The shrinker keeps exactly what a failure takes, and stops after its tries."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgefl.faults.shrink import shrunk


@settings(deadline=None)  # no wall time is asserted
@given(st.sets(st.integers(0, 19)))
def test_what_is_left_is_exactly_what_it_takes(needed):
    assert shrunk(range(20), lambda items: needed <= set(items), 1000) == sorted(needed)


def test_without_any_needed_item_nothing_is_left():
    assert shrunk([1, 2, 3], lambda _items: True) == []


@pytest.mark.parametrize("tries", [0, 1, 3, 10])
def test_it_stops_after_its_tries_with_something_that_fails(tries):
    calls = []

    def fails(items):
        calls.append(items)
        return {3, 11} <= set(items)

    left = shrunk(range(16), fails, tries)
    assert len(calls) <= tries
    assert {3, 11} <= set(left)
