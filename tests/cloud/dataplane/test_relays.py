"""Relays with a real database, spool and rounds; tests play devices and operator."""

import dataclasses
import errno
import hashlib
import threading
import time

import pytest
from blake3 import blake3

from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.relays import Patience, RelayParts, Relays
from cloud.state.jobs import Answer
from cloud.state.relay_rows import Message, RelayRows
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from cloud.state.store import open_database
from edgefl.errors import ConfigError, NotFound, ProtocolError
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.protocols.messages import BlobRef, RoundClosed, WirePlan
from edgefl.testing import ManualClock

CONTENT = b"what a message holds"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class FakeLink:
    """Presence that a test sets, and what was sent."""

    def __init__(self):
        self.here, self.gone, self.reason, self.told = {"a", "b"}, set(), "", []

    def online(self):
        return frozenset(self.here)

    def offline(self):
        return frozenset(self.gone)

    def send_job(self, device, message):
        self.told.append((device, message))

    def closed(self):
        return [(device, one.round, one.job_ended) for device, one in self.told if isinstance(one, RoundClosed)]


class Cloud:
    """The parts of a cloud that relays need; `restart` makes them anew on the same folder."""

    def __init__(self, folder):
        self.folder, self.engine, self.link = folder, None, FakeLink()
        self.key = new_fleet_key()
        self.start()

    def start(self, **patience):
        self.engine = open_database(self.folder / "cloud.db")
        self.rounds, self.spool = OpenRounds(), Spool(self.folder / "spool")
        rows = RelayRows(self.engine)
        self.storage = Storage(self.folder, patience.get("clock", time.monotonic))
        parts = RelayParts(
            rows, self.rounds, self.spool, self.link, lambda one: sign(one, self.key), self.folder / "relays",
            self.storage,
        )  # fmt: skip
        self.relays = Relays(parts, Patience(**patience))
        self.relays.resume()
        self.watcher = threading.Thread(target=self.relays.watch, name="relays")
        self.watcher.start()

    def stop(self):
        self.relays.close()
        self.watcher.join(10)
        assert not self.watcher.is_alive()
        self.engine.dispose()

    def restart(self, **patience):
        self.stop()
        self.start(**patience)

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

        taken = opened.accept(Answer(device=device, file=incoming.name), keep)
        self.spool.done_with(incoming)
        return taken

    def next_lines(self, relay, count=1):
        """Return the next lines that are no heartbeats, of a new stream."""
        lines = (line for line in self.relays.lines(relay, 0.05) if "heartbeat" not in line)
        return [next(lines) for _ in range(count)]


@pytest.fixture
def cloud(tmp_path):
    one = Cloud(tmp_path)
    yield one
    one.stop()


def message(number=1, device="a", within_s=60.0):
    return Message(
        number=number, device=device, envelope="envelope", content_sha256=SHA256, expires_s=time.time() + within_s
    )


def test_a_message_goes_out_and_its_reply_comes_back(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, "a"), message(2, "b")])
    plans = {device: plan for device, plan in cloud.link.told if isinstance(plan, WirePlan)}
    assert plans.keys() == {"a", "b"}
    assert (plans["a"].envelope, plans["a"].round, plans["a"].model.sha256) == ("envelope", 1, SHA256)
    assert plans["a"].model_blake3 == blake3(CONTENT).hexdigest()
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
    assert [one.plan.round for one in cloud.rounds.waiting_for("b")] == [2]
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
    assert opened.accept(Answer(device="a", reason="no flower here"), opened.record)
    [line] = cloud.next_lines(relay)
    assert (line["size"], line["reason"], line["lost"]) == (0, "no flower here", False)


def test_a_message_that_is_late_is_given_up(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [dataclasses.replace(message(1), expires_s=time.time() - 1)])  # a second, at least
    [line] = cloud.next_lines(relay)
    assert (line["reason"], line["lost"]) == ("device a: no reply in time", True)
    assert cloud.link.closed() == [("a", 1, False)]
    assert not cloud.rounds.waiting_for("a")


def test_a_device_that_is_gone_is_given_up_and_one_that_is_back_is_not(cloud):
    clock = ManualClock()
    cloud.restart(device_s=0.02, clock=clock)
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, "a"), message(2, "b")])
    for device in "ab":
        cloud.link.here.discard(device)
        cloud.link.gone.add(device)
    cloud.relays.presence_changed()
    clock.wait_for_looks()  # both were seen to be gone
    cloud.link.here.add("b")
    cloud.link.gone.discard("b")
    cloud.relays.presence_changed()
    clock.wait_for_looks()
    clock.advance(0.02)
    cloud.relays.presence_changed()
    [line] = cloud.next_lines(relay)
    assert (line["device"], line["lost"], line["reason"]) == ("a", True, "device a: offline for 0.02 s")
    assert cloud.rounds.waiting_for("b")


NO_ROOM_BYTES = 1 << 50  # more than a disk has


def looked(cloud, clock):
    """Have the watch look, and wait until it has: its second look begins after the first has ended."""
    for _ in range(2):
        cloud.relays.presence_changed()
        while cloud.relays._stirred:
            clock.wait_for_looks(1)


def test_while_nothing_can_be_stored_no_message_is_late(cloud):
    clock = ManualClock()
    cloud.restart(clock=clock, device_s=5.0)
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1, "a", within_s=10.0), message(2, "b", within_s=10.0)])
    cloud.storage.refused(OSError(errno.ENOSPC, "full"), NO_ROOM_BYTES)
    cloud.link.here.discard("b")
    cloud.link.gone.add("b")
    looked(cloud, clock)
    clock.advance(50.0)
    looked(cloud, clock)
    assert cloud.rounds.waiting_for("a")
    assert cloud.rounds.waiting_for("b")  # nobody is given up while its answer could not be kept
    shown = cloud.relays.get(relay)
    assert shown["waiting"].startswith(f"waiting for disk space in {cloud.folder}")
    assert shown["paused_s"] == 50.0

    cloud.storage.worked(NO_ROOM_BYTES)
    looked(cloud, clock)
    assert cloud.rounds.waiting_for("a")  # of whose ten seconds none was counted
    assert [plan.round for device, plan in cloud.link.told if device == "a"] == [1, 1]  # announced again
    [line] = cloud.next_lines(relay)
    assert (line["device"], line["reason"]) == ("b", "device b: offline for 5 s")
    cloud.relays.done(relay, [2])
    clock.advance(10.0)
    cloud.relays.presence_changed()
    [line] = cloud.next_lines(relay)
    assert (line["device"], line["reason"]) == ("a", "device a: no reply in time")


def test_without_a_broker_nobody_is_gone(cloud):
    clock = ManualClock()
    cloud.restart(device_s=0.02, clock=clock)
    relay = cloud.begin()
    cloud.link.here, cloud.link.gone, cloud.link.reason = set(), {"a"}, "no broker"
    cloud.relays.send(relay, [message(1)])
    for _ in range(10):
        cloud.relays.presence_changed()
        clock.wait_for_looks(2)
        clock.advance(0.02)
    assert cloud.rounds.waiting_for("a")


def test_what_the_operator_no_longer_wants_is_closed_on_the_device(cloud):
    relay = cloud.begin()
    cloud.relays.send(relay, [message(1)])
    opened = cloud.rounds.get(relay, 1)
    cloud.relays.done(relay, [1, 77])
    assert cloud.link.closed() == [("a", 1, False)]
    assert not opened.accept(Answer(device="a", reason="late"), opened.record)
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
    with pytest.raises(NotFound, match="is over: done"):
        cloud.relays.send(relay, [message(3)])


def test_a_relay_whose_operator_is_gone_ends(cloud):
    clock = ManualClock()
    cloud.restart(operator_s=0.2, stream_s=0.05, clock=clock)
    relay = cloud.begin()
    list(zip(range(8), cloud.relays.lines(relay, 0.05), strict=False))  # an operator that listens is there
    assert cloud.relays.running() == [relay]
    clock.advance(0.2)
    cloud.relays.presence_changed()  # has the watch look again
    while cloud.relays.running():
        clock.wait_for_looks(1)
    assert cloud.relays.get(relay)["error"] == "its operator was not heard of for 0.2 s"


def test_a_stream_ends_by_itself_so_that_it_is_asked_for_again(cloud):
    cloud.restart(stream_s=0.15)
    relay = cloud.begin()
    lines = list(cloud.relays.lines(relay, 0.05))
    assert lines
    assert all(line == {"heartbeat": True, "waiting": None, "paused_s": 0.0} for line in lines)


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        ({"content_sha256": "1" * 64}, ConfigError, "is not here; send it first"),
        ({"envelope": "x" * 40_000}, ProtocolError, "WirePlan has"),
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
    with pytest.raises(ConfigError, match="at most 1 are carried"):
        cloud.relays.send(cloud.begin(), [message(1), message(2)])


def test_an_unknown_relay_is_said(cloud):
    with pytest.raises(NotFound, match="there is no relay"):
        cloud.relays.contents("relay-x")
