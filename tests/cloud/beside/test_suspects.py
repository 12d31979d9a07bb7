"""Devices whose requests may have ended a stage's process."""

from __future__ import annotations

from cloud.beside.suspects import SUSPECT_S, Suspects
from edgefl.testing import ManualClock


def test_a_batch_of_several_makes_all_suspects_and_none_refused() -> None:
    suspects = Suspects(ManualClock())
    for _ in range(5):
        suspects.note_death(["a", "b", "a"])
    assert [suspects.are_alone(device) for device in "abc"] == [True, True, False]
    assert suspects.refusal("a") == ""


def test_who_ends_it_twice_alone_is_refused_for_a_while() -> None:
    clock = ManualClock()
    suspects = Suspects(clock)
    suspects.note_death(["a"])
    assert suspects.refusal("a") == ""
    suspects.note_death(["a", "a"])
    assert suspects.refusal("a") == (
        "the stage's process ended 2 times while it computed a request of device a alone; its requests are refused "
        "for 60 s. Check their values and sizes"
    )
    assert suspects.refusal("b") == ""
    clock.advance(SUSPECT_S)
    assert suspects.refusal("a") == ""
    assert not suspects.are_alone("a")
    suspects.note_death(["a"])  # counted anew
    assert suspects.refusal("a") == ""


def test_a_process_that_ends_without_work_blames_nobody() -> None:
    suspects = Suspects(ManualClock())
    suspects.note_death([])
    assert not suspects.are_alone("a")
