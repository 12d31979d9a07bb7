"""Events and instructions are values: what they say is all that they are."""

import dataclasses

import pytest

from edgefl.exchange import Announce, Answered, GiveUp, GiveUpReason, Offline, Tick, Yield


def test_equal_facts_are_equal_and_cannot_be_changed() -> None:
    assert Answered("a", at_s=1.0) == Answered("a", at_s=1.0) != Answered("a", at_s=2.0)
    assert Announce("a") != Yield("a")
    assert GiveUp("a", GiveUpReason.LATE) != GiveUp("a", GiveUpReason.OFFLINE)
    assert Offline("a", at_s=0.0).was_seen
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tick(at_s=1.0).at_s = 2.0  # type: ignore[misc]


def test_an_event_without_its_time_is_none() -> None:
    with pytest.raises(TypeError, match="at_s"):
        Tick()  # type: ignore[call-arg]
