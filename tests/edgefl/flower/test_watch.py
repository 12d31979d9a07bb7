"""Rounds are read off the messages, by hand."""

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from edgefl.flower.inside import task_identity
from edgefl.flower.watch import Watch, merged
from edgefl.testing import ManualClock


@pytest.fixture
def watch():
    with task_identity(1):
        yield Watch(ManualClock())


def ask(node=1000, kind="train", group_id="", **config):
    return Message(RecordDict({"config": ConfigRecord(config)}), node, kind, group_id=group_id)


def answer(watch, request, **metrics):
    watch.answered(request, Message(RecordDict({"m": MetricRecord(metrics)}), reply_to=request))


def test_the_round_is_the_servers_or_the_groups_or_counted(watch):
    for batch in (
        [ask(**{"server-round": 3})],
        [ask(kind="evaluate", **{"server-round": 3})],
        [ask(group_id="5")],
        [ask()],
        [ask(kind="evaluate")],
        [ask(kind="query")],
        [ask()],
    ):
        watch.sent(batch)
    assert [seen.number for seen in watch.rounds] == [3, 5, 6, 7]


def test_a_query_before_all_rounds_belongs_to_none(watch):
    watch.sent([ask(kind="query")])
    answer(watch, ask(kind="query"))
    assert watch.rounds == []


def test_metrics_are_weighted_means_and_failures_have_reasons(watch):
    requests = [ask(1000 + part) for part in range(4)]
    watch.sent(requests)
    answer(watch, requests[0], **{"num-examples": 1, "loss": 1.0})
    answer(watch, requests[1], **{"num-examples": 3, "loss": 2.0})
    watch.answered(requests[2], Message(Error(2, "broken"), reply_to=requests[2]))
    watch.finish()
    told = watch.rounds[0].report()
    assert (told.admitted, told.failed, told.missing) == (2, 1, 1)
    assert told.reasons == {"partition-2": "broken"}
    assert told.metrics == {"loss": 1.75}
    assert list(watch.failures()) == ["partition-2: broken"]


def test_training_that_nobody_answered_is_told_whether_or_not_anything_else_was(watch):
    assert watch.unanswered() is None
    watch.sent([ask(kind="query")])
    answer(watch, ask(kind="query"))
    assert watch.unanswered() is None
    request = ask(kind="train.apply")
    watch.sent([request])
    assert (watch.unanswered(), watch.num_asked("train")) == ("train", 1)
    answer(watch, request)
    assert watch.unanswered() is None


def test_what_fails_in_looking_on_is_logged_once_as_ours_and_changes_nothing(caplog):
    def broken(told):
        raise BrokenPipeError(told.round)

    with task_identity(1):
        watch = Watch(ManualClock(), broken)
        for number in (1, 2):
            request = ask(**{"server-round": number})
            watch.sent([request])
            answer(watch, request, **{"num-examples": 1.5, "huge": 10**400})  # more than a float can hold
        watch.finish()
    assert [seen.number for seen in watch.rounds] == [1, 2]
    assert watch.unanswered() is None
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
