import threading

import pytest

from cloud.dataplane.open_rounds import PRESENCE_CHANGED, OpenRound, OpenRounds
from cloud.state.enrolment import REMOVED
from cloud.state.jobs import Answer
from edgefl.config import TrainConfig
from edgefl.errors import CloudStopping, JobCancelled
from edgefl.protocols.messages import BlobRef, Signed, WirePlan
from edgefl.records import Traffic


def opened(job="job", number=1, cohort=("a", "b")):
    blob = BlobRef(sha256="0" * 64, size=1)
    plan = WirePlan(
        job=job, round=number, model=blob, model_blake3="00", bundle=Signed(text="", key_id="", signature=""),
        train=TrainConfig(), deadline_s=1.0, max_update_bytes=10,
    )  # fmt: skip
    return OpenRound(plan, frozenset(cohort))


def ignore(_answer):
    pass


def test_an_answer_is_taken_once_and_durable_before_it_is_seen():
    round_ = opened()
    durable = []
    answer = Answer(device="a", file="f")

    def make_durable(one):
        assert round_.events.empty()
        durable.append(one)

    assert round_.accept(answer, make_durable)
    assert not round_.accept(answer, make_durable)
    assert durable == [answer]
    assert round_.events.get_nowait() == answer
    assert round_.waiting() == {"b"}


def test_an_answer_that_cannot_be_made_durable_is_not_taken():
    round_ = opened()

    def fail(_answer):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        round_.accept(Answer(device="a", file="f"), fail)
    assert round_.waiting() == {"a", "b"}
    assert round_.accept(Answer(device="a", file="f"), ignore)


def test_a_closed_round_takes_nothing():
    round_ = opened()
    round_.accept(Answer(device="a", file="f"), ignore)
    assert round_.close() == {"b"}
    assert not round_.accept(Answer(device="b", file="f"), ignore)


def test_of_a_hundred_racing_duplicates_one_is_taken():
    round_ = opened()
    taken = []
    threads = [
        threading.Thread(target=lambda: taken.append(round_.accept(Answer(device="a", file="f"), ignore)))
        for _ in range(100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken.count(True) == 1


def test_rounds_are_found_by_key_and_by_device():
    rounds, first, second = OpenRounds(), opened("j1", 1, ("a",)), opened("j2", 4, ("a", "b"))
    rounds.add(first)
    rounds.add(second)
    assert rounds.get("j2", 4) is second
    assert rounds.get("j2", 1) is None
    assert rounds.waiting_for("a") == [first, second]
    first.accept(Answer(device="a", file="f"), ignore)
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


def test_presence_changes_are_merged_and_an_interrupt_reaches_its_job_only():
    rounds, mine, other = OpenRounds(), opened("mine"), opened("other")
    rounds.add(mine)
    rounds.add(other)
    rounds.presence_changed()
    rounds.presence_changed()
    error = JobCancelled("stop")
    rounds.interrupt(error, "mine")
    assert [mine.events.get_nowait(), mine.events.get_nowait()] == [PRESENCE_CHANGED, error]
    assert other.events.get_nowait() == PRESENCE_CHANGED
    assert other.events.empty()


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


def test_a_removed_device_is_refused_whether_it_has_answered_or_not():
    round_, durable = opened(), []
    answer = Answer(device="a", file="f", weight=2.0)
    round_.accept(answer, ignore)
    round_.forget("a", durable.append)
    assert durable == []  # its answer is in the database, where the registry refuses it
    assert round_.counted(round_.events.get_nowait()) == Answer(device="a", reason=REMOVED)
    round_.forget("b", durable.append)
    assert durable == [Answer(device="b", reason=REMOVED)]
    assert round_.counted(round_.events.get_nowait()) == durable[0]
    assert not round_.accept(Answer(device="b", file="f"), ignore)  # what was under way comes too late
    round_.forget("c", durable.append)
    assert len(durable) == 1
    assert round_.counted(Answer(device="c", file="f")).file == "f"


def test_the_rounds_that_have_a_device_are_those_of_its_cohorts():
    rounds, one = OpenRounds(), opened()
    rounds.add(one)
    rounds.add(opened("other", cohort=("c",)))
    one.accept(Answer(device="a", file="f"), ignore)
    assert rounds.having("a") == [one]
    assert rounds.waiting_for("a") == []
