"""One round while it collects: what its exchange is told, and what comes of it. Time is turned by hand."""

import errno
import threading

import pytest

from cloud.dataplane.open_round import Presence
from cloud.jobs.answers import AnswerRow
from cloud.state.enrolment import REMOVED
from cloud.state.storage import LOOK_S, Storage
from edgefl.exchange import Announce, Close, GiveUp, GiveUpReason, Terms, Yield
from edgefl.testing import ManualClock
from tests.cloud.dataplane.rounds import ignore, nobody_is_gone, opened


def test_an_answer_is_taken_once_and_durable_before_it_is_seen():
    done, durable = [], []
    round_ = opened(act=done.append)
    answer = AnswerRow(device="a", file="f")

    def make_durable(one):
        assert done == []
        durable.append(one)

    assert round_.accept(answer, make_durable)
    assert not round_.accept(answer, make_durable)
    assert durable == [answer]
    assert done == [Yield("a")]
    assert round_.take("a") == answer
    assert round_.waiting() == {"b"}


def test_an_answer_that_cannot_be_made_durable_is_not_taken():
    round_ = opened()

    def fail(_answer):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        round_.accept(AnswerRow(device="a", file="f"), fail)
    assert round_.waiting() == {"a", "b"}
    assert round_.accept(AnswerRow(device="a", file="f"), ignore)


def test_of_several_answers_those_are_taken_that_are_awaited_and_durable():
    done = []
    round_ = opened(act=done.append)
    answers = {number: AnswerRow(device=device, file="f") for number, device in enumerate(("a", "stranger", "b"))}

    def all_but_a(keys):
        assert keys == [0, 2]
        return [2]

    assert list(round_.accept_each(answers, all_but_a)) == [2]
    assert done == [Yield("b")]
    assert round_.waiting() == {"a"}
    assert not round_.accept_each({1: answers[1]}, lambda _keys: pytest.fail("nothing is to be made durable"))


def test_a_late_answer_is_taken_before_the_last_one_of_the_round_which_ends_it():
    done = []
    round_ = opened(act=done.append, owed=("late",))
    round_.accept(AnswerRow(device="a", file="f"), ignore)
    answers = {"b": AnswerRow(device="b", file="f"), "late": AnswerRow(device="late", file="g", late=True)}
    assert list(round_.accept_each(answers, list)) == ["late", "b"]
    assert done == [Yield("a"), Yield("late", is_late=True), Yield("b"), Close()]
    assert round_.still_owed() == []


def test_a_round_that_is_about_to_begin_has_all_its_time():
    assert opened(clock=ManualClock()).left_s() == 100.0


def test_a_closed_round_takes_nothing():
    done = []
    round_ = opened(act=done.append)
    round_.accept(AnswerRow(device="a", file="f"), ignore)
    round_.close()
    assert done == [Yield("a"), GiveUp("b", GiveUpReason.STOPPED), Close()]
    assert (round_.has_answered("a"), round_.has_answered("b"), round_.waits_for("b")) == (True, False, False)
    assert not round_.accept(AnswerRow(device="b", file="f"), ignore)


def test_a_device_that_leaves_gives_nothing_and_may_be_asked_again():
    """A region is told for a moment that a device is elsewhere; meanwhile it acknowledges nothing of it."""
    done = []
    round_ = opened(act=done.append)
    round_.leave(["a", "x"])
    assert (done, round_.asked, round_.waiting()) == ([], {"b"}, {"b"})
    assert not round_.has_answered("a")  # or its update would be taken for stored, and dropped by the device
    assert not round_.accept(AnswerRow(device="a", file="f"), ignore)
    round_.join(["a"])
    assert done == [Announce("a")]
    assert round_.accept(AnswerRow(device="a", file="f"), ignore)
    round_.leave(["a"])  # its answer is here
    assert round_.has_answered("a")
    round_.leave(["b"])
    assert done == [Announce("a"), Yield("a"), Close()]
    round_.join(["b"])  # it is over: nobody takes b's answer
    assert not round_.has_answered("b")


def test_of_a_hundred_racing_duplicates_one_is_taken():
    round_ = opened()
    taken = []
    threads = [
        threading.Thread(target=lambda: taken.append(round_.accept(AnswerRow(device="a", file="f"), ignore)))
        for _ in range(100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken.count(True) == 1


def test_a_removed_device_is_refused_whether_it_has_answered_or_not():
    done, durable = [], []
    round_ = opened(act=done.append)
    round_.accept(AnswerRow(device="a", file="f", weight=2.0), ignore)
    round_.forget("a", durable.append)
    assert durable == []  # its answer is in the database, where the registry refuses it
    assert round_.take("a") == AnswerRow(device="a", reason=REMOVED)
    round_.forget("a", durable.append)  # it was handed on
    round_.forget("b", durable.append)
    assert durable == [AnswerRow(device="b", reason=REMOVED)]
    assert round_.take("b") == durable[0]
    assert not round_.accept(AnswerRow(device="b", file="f"), ignore)  # what was under way comes too late
    round_.forget("c", durable.append)
    assert len(durable) == 1
    assert done == [Yield("a"), Yield("b"), Close()]


def test_what_a_removed_device_sent_makes_no_quorum():
    clock, done = ManualClock(), []
    round_ = opened(clock=clock, act=done.append)
    round_.begin()
    round_.note(Presence(frozenset({"a"}), frozenset({"b"}), is_connected=True))
    round_.accept(AnswerRow(device="a", file="f"), ignore)
    round_.forget("a", ignore)
    clock.advance(99.0)
    round_.look()
    assert round_.waits_for("b")


@pytest.mark.parametrize(
    ("terms", "ends_s"),
    [
        ({"deadline_s": 1000.0, "quorum": 1}, 25.0),  # grace, and 20 s to change its parent: above the default lease
        ({"deadline_s": 10.0, "quorum": 1}, 10.0),
        ({"deadline_s": 1000.0, "quorum": 1, "grace_s": 3.0}, 3.0),
        ({"deadline_s": 40.0, "quorum": 2}, 40.0),  # without its quorum, a round lasts until its deadline, not longer
    ],
    ids=["quorum", "deadline", "grace", "no quorum"],
)
def test_a_device_whose_region_is_lost_for_good_delays_no_round_for_long(terms, ends_s):
    clock, done = ManualClock(), []
    round_ = opened(cohort=("a", "c"), terms=Terms(offline_grace_s=5.0, **terms), clock=clock, act=done.append)
    round_.begin()
    round_.accept(AnswerRow(device="a", file="f"), ignore)
    round_.settle(["a"], admitted=True)
    round_.note(Presence(frozenset({"a"}), frozenset(), is_connected=True))  # c did not say that it is offline
    clock.advance(ends_s - 0.1)
    round_.look()
    assert round_.waiting() == {"c"}
    clock.advance(0.1)
    round_.look()
    assert (round_.waiting(), done[-1]) == (frozenset(), Close())


def test_presence_is_of_those_who_are_waited_for():
    clock, done = ManualClock(), []
    round_ = opened(cohort=("a", "b", "c"), clock=clock, act=done.append)
    round_.begin()
    round_.accept(AnswerRow(device="a", file="f"), ignore)
    del done[:]
    round_.note(Presence(frozenset(), frozenset({"b"}), is_connected=True))  # no message of c since the start
    assert round_.wait_s() == 25.0
    clock.advance(1.0)
    round_.note(Presence(frozenset({"b"}), frozenset(), is_connected=True))
    assert round_.wait_s() == 99.0
    round_.note(Presence(frozenset({"c"}), frozenset({"b"}), is_connected=True))
    round_.note(nobody_is_gone())  # the broker is lost
    assert round_.wait_s() == 99.0
    round_.note(Presence(frozenset(), frozenset({"b", "c"}), is_connected=True))
    clock.advance(5.0)
    assert round_.wait_s() == 0.0
    round_.look()
    assert done == [GiveUp("b", GiveUpReason.OFFLINE), GiveUp("c", GiveUpReason.OFFLINE), Close()]
    round_.note(nobody_is_gone())


def test_no_time_passes_while_nothing_can_be_stored_and_the_plan_is_told_again(tmp_path):
    clock, done = ManualClock(), []
    storage = Storage(tmp_path, clock)
    round_ = opened(cohort=("a",), clock=clock, storage=storage, act=done.append)
    round_.begin()
    assert done == [Announce("a")]
    clock.advance(90.0)
    storage.refused(OSError(errno.ENOSPC, "full"))
    clock.advance(1000.0)
    assert round_.wait_s() == 0.0  # it has not looked yet
    round_.look()
    assert (round_.is_paused, round_.wait_s()) == (True, LOOK_S)
    assert round_.accept(AnswerRow(device="z", file="f"), ignore) is False
    clock.advance(10.0)
    assert storage.look()  # the disk has room
    round_.look()
    assert done == [Announce("a"), Announce("a")]
    assert round_.wait_s() == 10.0


def test_pauses_that_were_over_before_anybody_looked_count_too():
    clock, done = ManualClock(), []
    storage = Storage(None, clock)
    storage.refused(OSError(errno.ENOSPC, "full"))
    clock.advance(7.0)
    round_ = opened(cohort=("a",), clock=clock, storage=storage, act=done.append)  # in the midst of one
    round_.begin()
    clock.advance(3.0)
    storage.worked()
    for _ in range(2):
        clock.advance(10.0)
        storage.refused(OSError(errno.ENOSPC, "full"))
        clock.advance(500.0)
        storage.worked()
    assert round_.accept(AnswerRow(device="z", file="f"), ignore) is False  # an answer has it look, too
    assert round_.wait_s() == 80.0


def test_the_queue_gives_what_is_to_be_done_and_after_the_end_whom_nobody_has_told():
    clock = ManualClock()
    round_ = opened(cohort=("a", "b", "c"), clock=clock)
    round_.begin()
    assert [round_.next(nobody_is_gone) for _ in "abc"] == [Announce("a"), Announce("b"), Announce("c")]
    round_.accept(AnswerRow(device="a", file="f"), ignore)
    clock.advance(100.0)
    assert round_.next(nobody_is_gone) == Yield("a")
    assert round_.next(nobody_is_gone) == GiveUp("b", GiveUpReason.LATE)
    round_.close()
    assert list(round_.given_up()) == [GiveUp("c", GiveUpReason.LATE)]
