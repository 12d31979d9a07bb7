"""What is next, by tables: prompts and tokens in turns, chunks, fairness, and how long one waits for others."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cloud.generation.schedule import StepSchedule, Turn
from cloud.generation.sessions import TailSequence
from edgefl.offload.generation.sampling import Sampling


@pytest.fixture(autouse=True)
def loop():
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()


def turn(device, key, rows=1, loop=None, **changes):
    future = asyncio.get_event_loop_policy().get_event_loop().create_future()
    given = {"is_prompt": rows > 1, "wants_token": True, "settled": future} | changes
    return Turn(TailSequence(device, str(key), key, 100, 0, 0.0), np.zeros((rows, 1), np.float32), Sampling(), **given)


def picked(schedule):
    pieces = schedule.pick()
    for piece in pieces:
        piece.turn.num_done += piece.num
    return [(piece.turn.session.key, piece.num) for piece in pieces]


def test_prompts_and_tokens_alternate_and_prompts_come_in_pieces() -> None:
    schedule = StepSchedule(max_sequences=4, prompt_rows=10)
    schedule.put(turn("a", 1, rows=25), 0.0)
    schedule.put(turn("b", 2), 0.0)
    assert picked(schedule) == [(1, 10)]
    assert picked(schedule) == [(2, 1)]
    schedule.put(turn("b", 2), 0.0)
    assert picked(schedule) == [(1, 10)]
    assert picked(schedule) == [(2, 1)]
    assert picked(schedule) == [(1, 5)]
    assert (picked(schedule), len(schedule)) == ([], 0)


def test_short_prompts_share_a_step() -> None:
    schedule = StepSchedule(max_sequences=4, prompt_rows=10)
    for key, rows in ((1, 4), (2, 4), (3, 4)):
        schedule.put(turn(f"d{key}", key, rows=rows), 0.0)
    assert picked(schedule) == [(1, 4), (2, 4), (3, 2)]
    assert picked(schedule) == [(3, 2)]


def test_all_tokens_that_wait_are_one_step_up_to_the_limit() -> None:
    schedule = StepSchedule(max_sequences=2, prompt_rows=10)
    for key in (1, 2, 3):
        schedule.put(turn(f"d{key}", key), 0.0)
    assert picked(schedule) == [(1, 1), (2, 1)]
    assert picked(schedule) == [(3, 1)]


def test_a_device_with_many_sequences_takes_turns_with_one_that_has_one() -> None:
    schedule = StepSchedule(max_sequences=1, prompt_rows=10)
    for key in range(5):
        schedule.put(turn("greedy", key), 0.0)
    schedule.put(turn("modest", 9), 0.0)
    assert picked(schedule) == [(0, 1)]
    assert picked(schedule) == [(9, 1)]


def test_a_suspect_s_prompt_is_computed_alone() -> None:
    schedule = StepSchedule(max_sequences=4, prompt_rows=10)
    schedule.put(turn("a", 1, rows=3), 0.0)
    schedule.put(turn("b", 2, rows=3, is_suspect=True), 0.0)
    schedule.put(turn("c", 3, rows=3), 0.0)
    assert picked(schedule) == [(1, 3), (3, 3)]
    assert picked(schedule) == [(2, 3)]


def test_a_step_waits_for_devices_that_are_about_to_send_and_for_no_other() -> None:
    schedule = StepSchedule(max_sequences=8, prompt_rows=10)
    for key in (1, 2):
        schedule.put(turn(f"d{key}", key), 0.0)
    picked(schedule)
    schedule.note_step([1, 2], seconds=0.4, now_s=1.0)
    schedule.put(turn("d1", 1), 1.05)
    assert schedule.wait_s(1.05) == 0.0  # nothing is known of the second
    schedule.put(turn("d2", 2), 1.06)
    picked(schedule)
    schedule.note_step([1, 2], seconds=0.4, now_s=2.0)
    schedule.put(turn("d1", 1), 2.01)
    assert schedule.wait_s(2.01) == pytest.approx(0.05)  # the second came 0.06 s after its last answer
    assert schedule.wait_s(2.2) == 0.0  # it did not come: others do not wait for it
    schedule.forget(2)
    assert schedule.wait_s(2.01) == 0.0


def test_one_that_waited_during_a_step_waits_for_those_of_that_step() -> None:
    """Otherwise two sequences would take turns for ever, and never be computed together."""
    schedule = StepSchedule(max_sequences=8, prompt_rows=10)
    for now_s in (0.0, 0.43):
        schedule.put(turn("d1", 1), now_s)
        picked(schedule)
        schedule.note_step([1], seconds=0.4, now_s=now_s + 0.4)
    schedule.put(turn("d1", 1), 0.86)
    picked(schedule)
    schedule.put(turn("d2", 2), 1.0)  # while the first is computed
    schedule.note_step([1], seconds=0.4, now_s=1.26)
    assert schedule.wait_s(1.26) == pytest.approx(0.03)


def test_a_slow_device_is_not_waited_for() -> None:
    schedule = StepSchedule(max_sequences=8, prompt_rows=10)
    for key in (1, 2):
        schedule.put(turn(f"d{key}", key), 0.0)
    picked(schedule)
    schedule.note_step([1, 2], seconds=0.4, now_s=1.0)
    schedule.put(turn("d2", 2), 1.5)  # half a second: more than a quarter of a step
    schedule.put(turn("d1", 1), 1.5)
    picked(schedule)
    schedule.note_step([1, 2], seconds=0.4, now_s=2.0)
    schedule.put(turn("d1", 1), 2.01)
    assert schedule.wait_s(2.01) == 0.0


def test_turns_are_removed() -> None:
    schedule = StepSchedule(max_sequences=8, prompt_rows=10)
    one, other = turn("a", 1), turn("b", 2)
    schedule.put(one, 0.0)
    schedule.put(other, 0.0)
    schedule.remove(one)
    schedule.remove(one)
    assert schedule.turns == [other]
    assert schedule.take_all() == [other]
    assert len(schedule) == 0
