"""Relays in the database: a message is taken once, answered once, and goes with its relay."""

import pytest

from cloud.jobs.answers import AnswerRow
from cloud.state.relay_rows import RelayMessage, RelayRows
from cloud.state.store import open_database
from edgefl.errors import NotFound
from edgefl.protocols.messages import Signed

BUNDLE = Signed(text="{}", key_id="k", signature="s")


@pytest.fixture
def rows(tmp_path):
    engine = open_database(tmp_path / "cloud.db")
    one = RelayRows(engine, clock=lambda: 100.0)
    one.create("relay-1", "app:app", BUNDLE)
    yield one
    engine.dispose()


def message(number, device="a"):
    return RelayMessage(number=number, device=device, envelope="e", content_sha256="0" * 64, expires_s=200.0)


def test_messages_are_taken_once_by_their_numbers(rows):
    assert rows.add("relay-1", [message(1), message(3)]) == [message(1), message(3)]
    assert rows.add("relay-1", [message(1), message(3), message(4)]) == [message(4)]
    assert rows.messages("relay-1") == [message(1), message(3), message(4)]
    rows.drop("relay-1", [4])
    assert rows.add("relay-1", [message(4)]) == []  # it was here, and is done with
    assert rows.get("relay-1")["sent"] == 4


def test_an_answer_stays_until_the_operator_has_it(rows):
    rows.add("relay-1", [message(1), message(2)])
    rows.answer("relay-1", 1, AnswerRow(device="a", file="relay-1/1/a"), lost=False)
    rows.answer("relay-1", 2, AnswerRow(device="a", reason="gone"), lost=True)
    first, second = rows.messages("relay-1")
    assert (first.answer, first.lost) == (AnswerRow(device="a", file="relay-1/1/a"), False)
    assert (second.answer, second.lost) == (AnswerRow(device="a", reason="gone"), True)
    rows.drop("relay-1", [1, 2])
    assert rows.messages("relay-1") == []
    assert rows.get("relay-1")["answered"] == 2


def test_a_relay_ends_once_with_all_that_waits_in_it(rows):
    rows.add("relay-1", [message(1)])
    assert rows.running() == {"relay-1": BUNDLE}
    assert rows.end("relay-1", "failed", "why")
    assert not rows.end("relay-1", "done", None)
    assert rows.running() == {}
    assert rows.messages("relay-1") == []
    assert rows.list() == [rows.get("relay-1")]
    assert rows.get("relay-1") == {
        "kind": "relay", "task": "app:app", "name": "app:app", "label": None, "id": "relay-1",
        "state": "failed", "sent": 1, "answered": 0,
        "error": "why", "created_s": 100.0, "ended_s": 100.0,
    }  # fmt: skip


def test_an_unknown_relay_is_said(rows):
    with pytest.raises(NotFound, match="there is no relay 'relay-2'"):
        rows.get("relay-2")
