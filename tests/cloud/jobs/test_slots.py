"""Slots: priority first, then age; never twice at a time."""

from __future__ import annotations

from cloud.jobs.slots import JobSlots


def test_a_higher_priority_comes_first_then_the_older_job():
    slots = JobSlots(1)
    for job, priority in (("a", 0), ("b", 0), ("c", 5)):
        slots.add(job, priority)
    assert slots.waiting() == ["c", "a", "b"]
    order = []
    while (job := slots.next()) is not None:
        assert slots.next() is None  # one slot
        order.append(job)
        slots.done(job)
    assert order == ["c", "a", "b"]


def test_a_running_job_that_is_added_again_runs_again_afterwards_only():
    slots = JobSlots(2)
    slots.add("a", 0)
    slots.add("a", 0)
    assert slots.next() == "a"
    slots.add("a", 0)
    assert slots.next() is None
    slots.done("a")
    assert (slots.next(), slots.next()) == ("a", None)


def test_nothing_starts_after_the_end():
    slots = JobSlots(2)
    slots.add("a", 0)
    slots.close()
    assert slots.next() is None
