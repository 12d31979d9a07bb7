"""Relays with a real database, spool and rounds; tests play devices and operator, and turn the clocks."""

import dataclasses
import errno
import hashlib
import queue
import threading

import pytest
from blake3 import blake3

from cloud.dataplane.live_relay import RelayTiming
from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.relays import RelayDependencies, Relays
from cloud.jobs.answers import AnswerRow
from cloud.state.relay_rows import RelayMessage, RelayRows
from cloud.state.spool import Spool
from cloud.state.storage import LOOK_S, Storage
from cloud.state.store import open_database
from edgefl.errors import ConfigError, NotFound, ProtocolError
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.protocols.messages import BlobRef, Deliver
from edgefl.testing import ManualClock
from tests.cloud.dataplane.rounds import FakeLink

CONTENT = b"what a message holds"
BEGAN_S = 1_000_000.0
HEARTBEAT = {"heartbeat": True, "waiting": None, "paused_s": 0.0}
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Cloud:
    """The parts of a cloud that relays need; `restart` makes them anew on the same folder."""

    def __init__(self, folder):
        self.folder, self.engine, self.link, self.clock = folder, None, FakeLink(), ManualClock()
        self.key = new_fleet_key()
        self.start()

    def start(self):
        self.engine = open_database(self.folder / "cloud.db")
        self.rounds, self.spool = OpenRounds(), Spool(self.folder / "spool")
        rows = RelayRows(self.engine)
        self.storage = Storage(self.folder, self.clock)
        deps = RelayDependencies(
            rows, self.rounds, self.spool, self.link, lambda one: sign(one, self.key), self.folder / "relays",
            self.storage,
        )  # fmt: skip
        self.relays = Relays(deps, RelayTiming(clock=self.clock, time_of_day=lambda: BEGAN_S + self.clock()))
        self.relays.resume()

    def stop(self):
        self.relays.close()
        self.engine.dispose()

    def restart(self):
        self.stop()
        self.start()

    def begin(self):
        relay = self.relays.start("app:app", BlobRef(sha256="0" * 64, size=1))
        self.relays.contents(relay).put(CONTENT)
        return relay

    def reply(self, relay, number, device, data=b"reply"):
        """Answer as a device does, by way of the fleet service."""
        opened = self.rounds.get(relay, number)
        incoming = self.spool.incoming(relay, number, device, 0)
        incoming.write(data)
        incoming.finish(blake3(data).hexdigest())

        def keep(answer):
            incoming.place()
            opened.record(answer)

        taken = opened.accept(AnswerRow(device=device, file=incoming.name), keep)
        self.spool.done_with(incoming)
        return taken

    def next_lines(self, relay, count=1):
        """Return the next lines that are no heartbeats, of a new stream."""
        lines = self.relays.lines(relay, 0.0)
        return [next(lines) for _ in range(count)]


@pytest.fixture
def cloud(tmp_path):
    one = Cloud(tmp_path)
    yield one
    one.stop()


def message(number=1, device="a", within_s=60.0):
    return RelayMessage(
        number=number, device=device, envelope="envelope", content_sha256=SHA256, expires_s=BEGAN_S + within_s
    )


def test_a_message_goes_out_and_its_reply_comes_back(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, "a"), message(2, "b")])
    plans = {device: plan for device, plan in cloud.link.told if isinstance(plan, Deliver)}
    assert plans.keys() == {"a", "b"}
    assert (plans["a"].envelope, plans["a"].round, plans["a"].content.sha256) == ("envelope", 1, SHA256)
    assert plans["a"].content_blake3 == blake3(CONTENT).hexdigest()
    assert cloud.rounds.get(relay, 1).source.read_bytes() == CONTENT
    assert cloud.reply(relay, 2, "b", b"from b")
    assert not cloud.rounds.get(relay, 2)
    [line] = cloud.next_lines(relay)
    assert line == {"number": 2, "device": "b", "size": 6, "reason": None, "lost": False}
    assert cloud.relays.reply(relay, 2).read_bytes() == b"from b"
    cloud.relays.done(relay, [2])
    with pytest.raises(NotFound, match="has no reply to message 2"):
        cloud.relays.reply(relay, 2)
    assert cloud.rounds.waiting_for("a")


def test_a_message_that_is_sent_twice_is_announced_once(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1)])
    cloud.relays.send(relay, [message(1), message(2)])
    assert [plan.round for _, plan in cloud.link.told] == [1, 2]


def test_after_a_restart_open_messages_wait_on_and_replies_are_told_again(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, "a"), message(2, "b")])
    cloud.reply(relay, 1, "a")
    cloud.restart()
    assert [one.assignment.round for one in cloud.rounds.waiting_for("b")] == [2]
    assert not cloud.rounds.waiting_for("a")
    assert [line["number"] for line in cloud.next_lines(relay)] == [1]
    assert cloud.relays.reply(relay, 1).read_bytes() == b"reply"
    assert cloud.reply(relay, 2, "b")


def test_after_a_restart_the_end_is_told_to_all_who_may_have_a_state(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, "a")])
    cloud.reply(relay, 1, "a")
    cloud.relays.done(relay, [1])
    cloud.restart()
    cloud.relays.end(relay, "done")
    assert cloud.link.closed() == [("a", 0, True), ("b", 0, True)]


def test_a_failure_is_a_reply_of_its_own(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1)])
    opened = cloud.rounds.get(relay, 1)
    assert opened.accept(AnswerRow(device="a", reason="no flower here"), opened.record)
    [line] = cloud.next_lines(relay)
    assert (line["size"], line["reason"], line["lost"]) == (0, "no flower here", False)


def test_a_message_that_is_late_is_given_up(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, within_s=30.0), message(2, within_s=-5.0)])  # a second, at least
    assert cloud.relays.look() == 1.0
    cloud.clock.advance(1.0)
    assert cloud.relays.look() == 0.0  # something was done
    assert cloud.relays.look() == 29.0
    [line] = cloud.next_lines(relay)
    assert (line["number"], line["reason"], line["lost"]) == (2, "device a: no reply in time", True)
    assert cloud.link.closed() == [("a", 2, False)]
    assert [one.assignment.round for one in cloud.rounds.waiting_for("a")] == [1]


def test_a_device_that_is_gone_is_given_up_and_one_that_is_back_is_not(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, "a"), message(2, "b")])
    cloud.link.here, cloud.link.gone = set(), {"a", "b"}
    assert cloud.relays.look() == 30.0
    cloud.clock.advance(29.0)
    cloud.link.here, cloud.link.gone = {"b"}, {"a"}
    assert cloud.relays.look() == 1.0
    cloud.clock.advance(1.0)
    cloud.relays.look()
    [line] = cloud.next_lines(relay)
    assert (line["device"], line["lost"], line["reason"]) == ("a", True, "device a: offline for 30 s")
    assert cloud.rounds.waiting_for("b")


def test_a_device_not_heard_of_since_the_clouds_start_is_waited_for_a_little_longer(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1)])
    cloud.link.here = set()
    assert cloud.relays.look() == 50.0
    cloud.link.gone = {"a"}  # it said so
    assert cloud.relays.look() == 30.0


def test_without_a_broker_nobody_is_gone(cloud):
    relay = cloud.begin()
    cloud.link.here, cloud.link.gone, cloud.link.reason = set(), {"a"}, "no broker"
    cloud.relays.send(relay, [message(1)])
    cloud.clock.advance(59.0)
    assert cloud.relays.look() == 1.0
    assert cloud.rounds.waiting_for("a")


def test_while_nothing_can_be_stored_nobody_is_late_and_afterwards_messages_are_told_again(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, within_s=50.0)])
    cloud.storage.refused(OSError(errno.ENOSPC, "full"), num_bytes=1 << 60)
    assert cloud.relays.look() == LOOK_S
    for _ in range(10):
        cloud.clock.advance(100.0)
        cloud.storage.refused(OSError(errno.ENOSPC, "full"))
        cloud.relays.contents(relay)  # its operator is there
        assert cloud.relays.look() == LOOK_S
    shown = cloud.relays.get(relay)
    assert shown["waiting"].startswith(f"waiting for disk space in {cloud.folder}")
    assert shown["paused_s"] == 1000.0
    cloud.storage.worked(1 << 60)
    assert cloud.relays.look() == 50.0
    assert [plan.round for _, plan in cloud.link.told] == [1, 1]
    cloud.clock.advance(50.0)
    cloud.relays.look()
    [line] = cloud.next_lines(relay)
    assert line["reason"] == "device a: no reply in time"


def test_an_end_that_the_disk_does_not_take_is_written_when_it_does(cloud, monkeypatch):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, within_s=5.0)])
    rows, refusals = RelayRows.answer, [OSError(errno.ENOSPC, "full")] * 2

    def answer(*args, **kwargs):
        if refusals:
            raise refusals.pop()
        rows(*args, **kwargs)

    monkeypatch.setattr(RelayRows, "answer", answer)
    cloud.clock.advance(5.0)
    cloud.relays.look()
    [line] = cloud.next_lines(relay)
    assert (line["lost"], refusals) == (True, [])


def test_the_watch_looks_when_it_is_stirred_and_ends_when_it_is_closed(cloud, monkeypatch):
    looks = queue.Queue()
    monkeypatch.setattr(cloud.relays, "look", lambda: looks.put(None) or 3600.0)
    watcher = threading.Thread(target=cloud.relays.watch, name="relays")
    watcher.start()
    looks.get(timeout=10)
    cloud.relays.wake()
    cloud.relays.close()
    watcher.join(10)
    assert not watcher.is_alive()


def test_what_the_operator_no_longer_wants_is_closed_on_the_device(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1)])
    opened = cloud.rounds.get(relay, 1)
    cloud.relays.done(relay, [1, 77])
    assert cloud.link.closed() == [("a", 1, False)]
    assert not opened.accept(AnswerRow(device="a", reason="late"), opened.record)
    cloud.restart()
    assert not cloud.rounds.waiting_for("a")


def test_the_end_of_a_relay_leaves_nothing(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, "a"), message(2, "b")])
    cloud.reply(relay, 1, "a")
    cloud.relays.end(relay, "done")
    cloud.relays.end(relay, "failed", "too late to matter")
    assert cloud.relays.get(relay)["state"] == "done"
    assert cloud.relays.running() == []
    assert cloud.link.closed() == [("a", 2, True), ("b", 2, True)]
    assert not cloud.rounds.waiting_for("b")
    assert list((cloud.folder / "relays").iterdir()) == []
    assert [path.name for path in (cloud.folder / "spool").iterdir()] == [".free"]
    assert cloud.next_lines(relay) == [{"state": "done", "error": None}]
    with pytest.raises(NotFound, match="has ended: done"):
        cloud.relays.send(relay, [message(3)])


def test_a_relay_whose_operator_is_gone_ends(cloud):
    relay = cloud.begin()
    cloud.clock.advance(59.0)
    assert next(cloud.relays.lines(relay, 0.0)) == HEARTBEAT  # an operator that listens is there
    cloud.clock.advance(59.0)
    assert cloud.relays.look() == 1.0
    cloud.clock.advance(1.0)
    cloud.relays.look()
    assert cloud.relays.running() == []
    assert cloud.relays.get(relay)["error"] == "its operator sent no request for 60 s"


def test_a_stream_ends_by_itself_so_that_it_is_asked_for_again(cloud):
    lines = cloud.relays.lines(cloud.begin(), 0.0)
    assert [next(lines), next(lines)] == [HEARTBEAT] * 2
    cloud.clock.advance(60.0)
    assert list(lines) == []


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        ({"content_sha256": "1" * 64}, ConfigError, "is missing; upload it first"),
        ({"envelope": "x" * 40_000}, ProtocolError, "Deliver has"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_changes(cloud, bad, error, said):
    relay = cloud.begin()
    with pytest.raises(error, match=said):
        cloud.relays.send(relay, [message(1), dataclasses.replace(message(2), **bad)])
    assert cloud.relays.get(relay)["sent"] == 0
    assert cloud.link.told == []


def test_too_many_messages_are_refused(cloud, monkeypatch):
    monkeypatch.setattr("cloud.dataplane.relays.MAX_OPEN", 1)
    with pytest.raises(ConfigError, match="at most 1 are allowed"):
        cloud.relays.send(cloud.begin(), [message(1), message(2)])


def test_an_unknown_relay_is_said(cloud):
    with pytest.raises(NotFound, match="there is no relay"):
        cloud.relays.contents("relay-x")
