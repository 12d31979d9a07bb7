"""The place of a worker: what it was asked comes back when it is lost."""

import pytest

from edgefl.process.workers.messages import Ready, Reply
from edgefl.process.workers.slot import Slot
from edgefl.process.workers.work_queue import WorkItem


class Echo:
    def __init__(self):
        self.says, self.ended = [Ready()], []

    def ask(self, message):
        self.says.append(Reply(message, 5.0))

    def receive(self):
        return self.says.pop(0)

    def end(self, *, kindly):
        self.ended.append(kindly)


def test_it_is_free_awaited_and_ended_kindly_where_it_is_idle():
    slot, item = Slot(Echo), WorkItem("a")
    with pytest.raises(RuntimeError, match="start comes before ask"):
        slot.ask(item, "a", 0.0)
    slot.start(1.0)
    assert (slot.free, slot.since_s) == (False, 1.0)
    assert slot.receive(2.0) is None
    assert slot.free
    slot.ask(item, "a", 3.0)
    assert (slot.free, slot.awaited, slot.since_s) == (False, True, 3.0)
    slot.ask(WorkItem("b"), "b", 4.0)
    assert slot.since_s == 3.0  # with the first
    assert slot.receive(5.0) == Reply("a", 5.0)
    assert (slot.since_s, slot.peak_rss_mb) == (5.0, 5.0)
    slot.close()
    assert slot.worker.ended == [False]  # it was at work
    slot = Slot(Echo)
    slot.start(0.0)
    slot.receive(0.0)
    slot.close()
    assert slot.worker.ended == [True]


def test_what_is_taken_back_or_left_is_awaited_by_nobody():
    slot, first, second = Slot(Echo), WorkItem("a"), WorkItem("b")
    slot.start(0.0)
    slot.ask(first, "a", 0.0)
    assert slot.take_back() is None
    slot.ask(second, "b", 0.0)
    assert slot.take_back() is second
    assert list(slot.asked) == [first, None]
    slot.leave_run()
    assert (list(slot.asked), slot.awaited) == ([None, None], False)


def test_a_closed_place_starts_nobody():
    slot = Slot(Echo)
    slot.close()
    slot.start(0.0)
    assert slot.worker is None
