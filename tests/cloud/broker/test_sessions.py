"""Sessions by hand and by law: who hears what, what waits, what is sent again."""

from __future__ import annotations

import itertools

import pytest

from cloud.broker import sessions as sessions_module
from cloud.broker.packets import PUBACK, PUBCOMP, PUBREC, MqttMessage, acknowledgement, publish
from cloud.broker.sessions import Session, Sessions, matches


def message(topic: str = "a/b", payload: bytes = b"x", qos: int = 1, *, retain: bool = False) -> MqttMessage:
    return MqttMessage(topic, payload, qos, retain)


class Client:
    """A connected session, and what was written to it."""

    def __init__(self, sessions: Sessions, name: str = "c", *, clean: bool = True) -> None:
        self.session, self.was_here = sessions.open(name, clean=clean)
        self.written: list[bytes] = []
        self.session.resume(self.written.append, again=True)


def test_a_message_is_heard_once_with_the_highest_qos_of_its_filters() -> None:
    sessions = Sessions()
    client = Client(sessions)
    for filter_, qos in (("a/+", 0), ("#", 1), ("a/b", 0), ("b/#", 2)):
        sessions.subscribe(client.session, filter_, qos)
    sessions.publish(message(qos=2))
    assert client.written == [publish(message(), 1, 1, retain=False)]
    sessions.publish(message(qos=0))
    assert client.written[1:] == [publish(message(), 0, 0, retain=False)]


LEVELS = ("a", "b", "", "+", "#")


def test_by_law_the_tree_says_what_matching_says() -> None:
    filters = [
        "/".join(levels)
        for count in (1, 2, 3)
        for levels in itertools.product(LEVELS, repeat=count)
        if "#" not in levels[:-1] and "/".join(levels)
    ]
    topics = ["/".join(levels) for n in (1, 2, 3) for levels in itertools.product("ab", repeat=n)] + [
        "$a",
        "$a/b",
        "/",
        "a/",
    ]
    for topic in topics:
        sessions = Sessions()
        clients = {filter_: Client(sessions, filter_) for filter_ in filters}
        for filter_, client in clients.items():
            sessions.subscribe(client.session, filter_, 0)
        sessions.publish(message(topic))
        heard = {filter_ for filter_, client in clients.items() if client.written}
        assert heard == {filter_ for filter_ in filters if matches(filter_, topic)}, topic


@pytest.mark.parametrize(
    ("filter_", "topic", "yes"),
    [
        ("a/#", "a", True), ("a/#", "a/b/c", True), ("+", "a/b", False), ("+/+", "/a", True), ("/+", "/a", True),
        ("#", "$SYS/x", False), ("+/x", "$SYS/x", False), ("$SYS/#", "$SYS/x", True), ("a/b", "a/b", True),
        ("a", "a/b", False), ("a/+/c", "a/b/c", True), ("#", "/", True),
    ],
)  # fmt: skip
def test_matching_by_hand(filter_: str, topic: str, yes: bool) -> None:
    assert matches(filter_, topic) is yes


def test_what_is_retained_comes_with_the_subscription_and_an_empty_message_clears_it() -> None:
    sessions = Sessions()
    sessions.publish(message("a/b", b"first", retain=True))
    sessions.publish(message("a/b", b"last", retain=True))
    sessions.publish(message("a/c", b"other", retain=True))
    client = Client(sessions)
    sessions.subscribe(client.session, "a/b", 0)
    assert client.written == [publish(message(payload=b"last"), 0, 0, retain=True)]
    sessions.subscribe(client.session, "+/c", 0)
    assert client.written[1:] == [publish(message("a/c", b"other"), 0, 0, retain=True)]
    sessions.publish(message("a/b", b"", retain=True))
    late = Client(sessions, "late")
    sessions.subscribe(late.session, "a/#", 0)
    assert late.written == [publish(message("a/c", b"other"), 0, 0, retain=True)]


def test_a_session_that_is_kept_gets_what_came_meanwhile_and_a_clean_one_does_not() -> None:
    sessions = Sessions()
    away = Client(sessions, clean=False)
    assert not away.was_here
    sessions.subscribe(away.session, "a/b", 1)
    away.session.pause()
    sessions.publish(message(payload=b"0", qos=0))
    sessions.publish(message(payload=b"1"))
    back = Client(sessions, clean=False)
    assert back.was_here
    assert back.written == [publish(message(payload=b"1"), 1, 1, retain=False)]
    sessions.publish(message(payload=b"2"))
    assert len(back.written) == 2
    fresh = Client(sessions)
    assert (fresh.was_here, fresh.written) == (False, [])
    sessions.publish(message())
    assert fresh.written == []


def test_what_was_not_acknowledged_is_sent_again_in_its_order() -> None:
    sessions = Sessions()
    first = Client(sessions, clean=False)
    sessions.subscribe(first.session, "#", 2)
    sessions.publish(message(payload=b"1"))
    sessions.publish(message(payload=b"2", qos=2))
    sessions.publish(message(payload=b"3", qos=2))
    first.session.acknowledge(PUBREC, 2)
    assert first.written[3:] == [acknowledgement(6, 2)]
    first.session.pause()
    again = Client(sessions, clean=False)
    one, three = (publish(message(payload=b"%d" % n), n and min(n, 2), n, retain=False) for n in (1, 3))
    assert again.written == [bytes([one[0] | 8]) + one[1:], acknowledgement(6, 2), bytes([three[0] | 8]) + three[1:]]
    for kind, number in ((PUBACK, 1), (PUBCOMP, 2), (PUBREC, 3), (PUBCOMP, 3), (PUBACK, 99)):
        again.session.acknowledge(kind, number)
    again.session.pause()
    assert Client(sessions, clean=False).written == []


def test_a_client_that_acknowledges_nothing_has_so_many_under_way_and_so_many_behind(monkeypatch) -> None:
    monkeypatch.setattr(sessions_module, "MAX_IN_FLIGHT", 2)
    monkeypatch.setattr(sessions_module, "MAX_QUEUED", 3)
    sessions = Sessions()
    slow = Client(sessions)
    sessions.subscribe(slow.session, "#", 1)
    for number in range(10):
        sessions.publish(message(payload=b"%d" % number))
    assert [packet[-1:] for packet in slow.written] == [b"0", b"1"]
    for number in range(1, 8):
        slow.session.acknowledge(PUBACK, number)
    assert [packet[-1:] for packet in slow.written] == [b"0", b"1", b"2", b"3", b"4"]


def test_one_that_takes_nothing_at_the_moment_loses_qos_0_and_nothing_else() -> None:
    sessions = Sessions()
    client = Client(sessions)
    sessions.subscribe(client.session, "#", 1)
    client.session.pause()
    sessions.publish(message(payload=b"0", qos=0))
    sessions.publish(message(payload=b"1"))
    assert client.written == []
    client.session.resume(client.written.append, again=False)
    assert client.written == [publish(message(payload=b"1"), 1, 1, retain=False)]


def test_packet_ids_that_are_in_use_are_passed_over() -> None:
    session = Session("c")
    written: list[bytes] = []
    session.resume(written.append, again=True)
    session.deliver(message(), 1)
    session._number = 0xFFFF
    session.deliver(message(), 1)
    assert [packet[7:9] for packet in written] == [b"\0\1", b"\0\2"]


def test_a_forgotten_session_leaves_nothing_behind() -> None:
    sessions = Sessions()
    client = Client(sessions, clean=False)
    for filter_ in ("a/b/c", "a/+", "#", "a/b"):
        sessions.subscribe(client.session, filter_, 1)
    sessions.unsubscribe(client.session, "a/b")
    sessions.unsubscribe(client.session, "never/there")
    sessions.publish(message("a/b"))
    assert len(client.written) == 1
    sessions.forget("c")
    sessions.forget("c")
    assert sessions._root.below == {}
    sessions.publish(message("a/b"))
    assert len(client.written) == 1
