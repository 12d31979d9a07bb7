import threading

import pytest

from cloud.dataplane.open_round import OpenRound
from cloud.dataplane.open_rounds import OpenRounds
from cloud.jobs.answers import AnswerRow
from edgefl.errors import CloudStopping, JobCancelled
from edgefl.exchange import Announce
from edgefl.records import Traffic
from tests.cloud.dataplane.rounds import TERMS, ignore, nobody_is_gone, opened


def test_rounds_are_found_by_key_and_by_device():
    rounds, first, second = OpenRounds(), opened("j1", 1, ("a",)), opened("j2", 4, ("a", "b"))
    rounds.add(first)
    rounds.add(second)
    assert rounds.get("j2", 4) is second
    assert rounds.get("j2", 1) is None
    assert rounds.waiting_for("a") == [first, second]
    first.accept(AnswerRow(device="a", file="f"), ignore)
    assert rounds.waiting_for("a") == [second]
    assert rounds.waiting_for("z") == []


def test_traffic_is_summed_over_the_closed_rounds_of_a_job():
    rounds = OpenRounds()
    for number in (1, 2):
        one = opened("j", number)
        rounds.add(one)
        one.up_bytes, one.down_bytes = 5, 7
        rounds.remove(one)
    assert rounds.traffic("j") == Traffic(up_bytes=10, down_bytes=14)
    assert rounds.traffic("other") == Traffic()


def test_calls_to_look_are_merged_and_an_interrupt_reaches_its_job_only():
    rounds, mine, other = OpenRounds(), opened("mine"), opened("other")
    rounds.add(mine)
    rounds.add(other)
    rounds.wake()
    rounds.wake()
    rounds.interrupt(JobCancelled("stop"), "mine")
    looks = []

    def who_is_there():
        looks.append("look")
        return nobody_is_gone()

    with pytest.raises(JobCancelled, match="stop"):
        mine.next(who_is_there)
    assert looks == ["look"]
    other.begin()
    assert other.next(who_is_there) == Announce("a")
    assert looks == ["look"] * 2


def test_nobody_is_answered_until_the_rounds_of_before_are_open_again():
    rounds = OpenRounds()
    assert rounds.wait_resumed(0)
    rounds.expect(["a", "b"])
    assert not rounds.wait_resumed(0)
    rounds.add(opened("a"))
    assert not rounds.wait_resumed(0)
    later = threading.Timer(0.05, rounds.resumed, ("b",))  # its job cannot go on
    later.start()
    assert rounds.wait_resumed(10)
    later.join()


def test_a_job_that_is_interrupted_between_rounds_opens_no_other():
    rounds = OpenRounds()
    rounds.interrupt(JobCancelled("stop"), "job")
    assert rounds.is_stopped("job")
    assert not rounds.is_stopped("another")
    assert not rounds.stopping
    rounds.add(opened("another"))
    for attempt in (lambda: rounds.add(opened()), lambda: rounds.refuse_stopped("job")):
        with pytest.raises(JobCancelled, match="stop"):
            attempt()
    assert rounds.get("job", 1) is None
    rounds.forget("job")
    rounds.refuse_stopped("job")
    rounds.interrupt(CloudStopping("end"))
    assert rounds.stopping
    with pytest.raises(CloudStopping):
        rounds.refuse_stopped("another")


def test_the_rounds_that_have_a_device_are_those_of_its_cohorts():
    rounds, one = OpenRounds(), opened()
    rounds.add(one)
    rounds.add(opened("other", cohort=("c",)))
    one.accept(AnswerRow(device="a", file="f"), ignore)
    assert rounds.having("a") == [one]
    assert rounds.waiting_for("a") == []


def test_an_update_of_a_round_that_is_over_is_wanted_until_the_next_one_is_over():
    rounds = OpenRounds()
    assert not rounds.wants_late("job", 1, "a")
    rounds.hold("job", 1, ["a"])
    assert [rounds.wants_late("job", number, device) for number, device in ((1, "a"), (1, "b"), (2, "a"))] == [
        True, False, False,
    ]  # fmt: skip
    later = OpenRound(opened(number=2).assignment, ("a", "b"), TERMS, owed=("a",))
    rounds.add(later)
    later.begin()
    assert rounds.wants_late("job", 1, "a")
    assert later.accept(AnswerRow(device="a", file="f", late=True), ignore)
    assert (rounds.wants_late("job", 1, "a"), later.has_late("a"), later.waits_for("a")) == (False, True, True)
    assert not later.accept(AnswerRow(device="a", file="f", late=True), ignore)
    assert later.accept(AnswerRow(device="a", file="g"), ignore)
    assert [later.take("a", is_late=True).file, later.take("a").file] == ["f", "g"]
    rounds.forget("job")
    rounds.remove(later)
    assert not rounds.wants_late("job", 1, "a")
