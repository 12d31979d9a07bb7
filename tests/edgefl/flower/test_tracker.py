"""Rounds are read off the messages, by hand."""

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from edgefl.flower.internals import give_id, task_identity
from edgefl.flower.tracker import RoundTracker, merged
from edgefl.testing import ManualClock


@pytest.fixture
def tracker():
    with task_identity(1):
        yield RoundTracker(ManualClock())


def ask(node=1000, kind="train", group_id="", **config):
    return Message(RecordDict({"config": ConfigRecord(config)}), node, kind, group_id=group_id)


def with_id(message, message_id):
    give_id(message, message_id)
    return message


def answer(tracker, request, **metrics):
    tracker.answered(request, Message(RecordDict({"m": MetricRecord(metrics)}), reply_to=request))


def test_the_round_is_the_servers_or_the_groups_or_counted(tracker):
    for batch in (
        [ask(**{"server-round": 3})],
        [ask(kind="evaluate", **{"server-round": 3})],
        [ask(group_id="5")],
        [ask()],
        [ask(kind="evaluate")],
        [ask(kind="query")],
        [ask()],
    ):
        tracker.sent(batch)
    assert [seen.number for seen in tracker.rounds] == [3, 5, 6, 7]


def test_a_query_before_all_rounds_belongs_to_none(tracker):
    tracker.sent([ask(kind="query")])
    answer(tracker, ask(kind="query"))
    assert tracker.rounds == []


def test_metrics_are_weighted_means_and_failures_have_reasons(tracker):
    requests = [ask(1000 + part) for part in range(4)]
    tracker.sent(requests)
    answer(tracker, requests[0], **{"num-examples": 1, "loss": 1.0})
    answer(tracker, requests[1], **{"num-examples": 3, "loss": 2.0})
    tracker.answered(requests[2], Message(Error(2, "broken"), reply_to=requests[2]))
    tracker.finish()
    told = tracker.rounds[0].report()
    assert (told.admitted, told.failed, told.missing) == (2, 1, 1)
    assert told.reasons == {"partition-2": "broken"}
    assert told.metrics == {"loss": 1.75}
    assert list(tracker.failures()) == ["partition-2: broken"]


def test_who_leaves_between_two_training_messages_of_a_round_is_missing(tracker):
    first, second = ([with_id(ask(1000 + part, group_id="1"), f"{turn}-{part}") for part in range(3)] for turn in "ab")
    tracker.sent(first)
    for request in first:
        answer(tracker, request)
    tracker.sent(second)
    answer(tracker, second[0])
    answer(tracker, first[1])  # once more, too late
    tracker.sent([ask(1002, kind="evaluate", group_id="1")])
    answer(tracker, ask(1002, kind="evaluate", group_id="1"))
    report = tracker.rounds[0].report()
    assert (report.admitted, report.failed, report.missing) == (1, 0, 2)
    assert tracker.rounds[0].participants == {"partition-0"}


def test_unanswered_training_is_reported_even_if_other_messages_were_answered(tracker):
    assert tracker.unanswered() is None
    tracker.sent([ask(kind="query")])
    answer(tracker, ask(kind="query"))
    assert tracker.unanswered() is None
    request = ask(kind="train.apply")
    tracker.sent([request])
    assert (tracker.unanswered(), tracker.num_asked("train")) == ("train", 1)
    answer(tracker, request)
    assert tracker.unanswered() is None


def test_a_failure_of_the_tracker_is_logged_once_and_changes_nothing(caplog):
    def broken(told):
        raise BrokenPipeError(told.round)

    with task_identity(1):
        tracker = RoundTracker(ManualClock(), broken)
        for number in (1, 2):
            request = ask(**{"server-round": number})
            tracker.sent([request])
            answer(tracker, request, **{"num-examples": 1.5, "huge": 10**400})  # more than a float can hold
        tracker.finish()
    assert [seen.number for seen in tracker.rounds] == [1, 2]
    assert tracker.unanswered() is None
    assert [one.getMessage().partition(": ")[0] for one in caplog.records] == [
        "a fault of edgefl itself, not of the app; the run continues, but the records of the rounds may be incomplete",
        "a fault of edgefl itself, not of the app; the run continues, but the display of the rounds may be incomplete",
    ]


def test_the_servers_metrics_keep_their_names():
    assert merged({"loss": 1.0, "bad": float("nan")}, {"loss": 2.0}, {"loss": 3.0, "other": 4.0}) == {
        "loss": 1.0,
        "clients_loss": 2.0,
        "train_loss": 3.0,
        "other": 4.0,
    }
