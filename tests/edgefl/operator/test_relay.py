"""An operator's end of a relay, on a real HTTPS plane whose devices a test plays."""

from __future__ import annotations

import threading

import pytest

from edgefl.errors import CloudUnreachable, JobCancelled, JobFailed
from edgefl.operator.client import CloudClient, Patience, load_credentials
from edgefl.operator.relay import Relay


@pytest.fixture
def opened(http_plane):
    """Return a function that opens a connection."""
    return lambda: CloudClient(None, load_credentials(http_plane.credentials))


@pytest.fixture
def relay(http_plane, opened):
    return Relay(opened, "app:app", http_plane.blobs.put(b"zip"), Patience(seconds=10))


def message(number, content, device="a", within_s=60.0):
    return {"number": number, "device": device, "envelope": "e", "content": content, "within_s": within_s}


def test_messages_and_replies(http_plane, relay, play_devices):
    play_devices(lambda device, plan, content: content[::-1] if device == "a" else "no data here", "a", "b")
    with relay:
        assert relay.devices() == ["a", "b"]
        sent = [message(1, relay.hold(b"abc"), "a"), message(2, relay.hold(b"abc"), "b")]
        relay.send(sent)
        lines = {line["number"]: line for line in (relay.next_reply({1, 2}, 10), relay.next_reply({1, 2}, 10))}
        assert relay.fetch(1) == b"cba"
        assert (lines[2]["size"], lines[2]["reason"]) == (0, "no data here")
        contents = http_plane.relays.contents(relay.id)
        relay.done(sent[:1])
        assert contents.has(sent[0]["content"])  # the other holds it still
        relay.done(sent[1:])
        assert not contents.has(sent[0]["content"])
        assert relay.next_reply({1, 2}, 0.05) is None
    assert http_plane.relays.get(relay.id)["state"] == "done"


def test_a_reply_to_what_nobody_waits_for_is_forgotten_with_the_next(http_plane, relay, play_devices):
    answer = threading.Event()

    def respond(_device, plan, _content):
        if plan.round == 1:
            assert answer.wait(10)
        return b"reply"

    play_devices(respond, "a")
    with relay:
        sent = [message(1, relay.hold(b"x")), message(2, relay.hold(b"x"))]
        relay.send(sent)
        relay.next_reply({2}, 10)
        with relay._changed:
            relay._wanted.discard(1)
        answer.set()
        with relay._changed:
            assert relay._changed.wait_for(lambda: relay._strays, 10)
        relay.done(sent[1:])
        assert http_plane.relays._live[relay.id].replies == {}


def test_what_ends_the_relay_frees_whoever_waits(http_plane, relay):
    with relay:
        relay.send([message(1, relay.hold(b"x"))])
        threading.Timer(0.2, http_plane.relays.end, (relay.id, "cancelled", "cancelled by its operator")).start()
        with pytest.raises(JobCancelled, match="is cancelled: cancelled by its operator"):
            relay.next_reply({1}, 30)
    assert http_plane.relays.get(relay.id)["state"] == "cancelled"


def test_a_call_into_a_relay_that_ended_says_why_it_did(http_plane, relay):
    with relay:
        http_plane.relays.end(relay.id, "failed", "out of patience")
        with pytest.raises(JobFailed, match="out of patience"):
            relay.hold(b"x")


def test_how_the_context_ends_is_how_the_relay_does(http_plane, relay):
    with pytest.raises(ValueError, match="no luck"), relay:
        raise ValueError("no luck")
    assert http_plane.relays.get(relay.id).items() >= {"state": "failed", "error": "no luck"}.items()


def test_a_ctrl_c_cancels_it(http_plane, relay):
    with pytest.raises(KeyboardInterrupt), relay:
        raise KeyboardInterrupt
    assert http_plane.relays.get(relay.id).items() >= {"state": "cancelled", "error": "KeyboardInterrupt"}.items()


def test_a_cloud_that_restarts_costs_time_only(http_plane, relay, play_devices):
    play_devices(lambda _device, _plan, content: content, "a")
    with relay:
        http_plane.server.stop()
        threading.Timer(0.5, http_plane.server.start).start()
        sent = [message(1, relay.hold(b"abc"))]
        relay.send(sent)
        assert relay.next_reply({1}, 20)["number"] == 1
        relay.done(sent)
    assert http_plane.relays.get(relay.id)["state"] == "done"


def test_a_cloud_that_stays_away_ends_it(http_plane, opened, monkeypatch):
    monkeypatch.setattr("edgefl.operator.relay.FAREWELL_S", 0.5)
    relay = Relay(opened, "app:app", http_plane.blobs.put(b"zip"), Patience(seconds=0.5))
    try:
        with relay:
            http_plane.server.stop()
            with pytest.raises(CloudUnreachable):
                relay.next_reply({1}, 30)
    finally:
        http_plane.server.start()
