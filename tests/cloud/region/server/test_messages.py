"""Messages below a region: announced, their replies sent up once, also after a restart, and forgotten."""

from __future__ import annotations

import asyncio
import queue

import pytest

from cloud.dataplane.grpc_fleet import FleetDependencies
from cloud.dataplane.open_rounds import OpenRounds
from cloud.jobs.answers import AnswerRow
from cloud.region.server.messages import RegionMessages
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.spool import Arrival, Spool
from cloud.state.store import open_database
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import Deliver, RoundClosed, Signed
from edgefl.protocols.tiers import Message
from tests.cloud.dataplane.rounds import FakeLink
from tests.threaded import LoopThread

WAIT_S = 30.0


class Region:
    """A region's messages with a real database and spool; what it sends is in `sent`, and answered by `states`."""

    def __init__(self, folder):
        self.folder, self.sent, self.states = folder, queue.SimpleQueue(), queue.SimpleQueue()
        self.thread = LoopThread("region messages")
        self.start()

    def start(self):
        self.engine = open_database(self.folder / "region.db")
        self.blobs, self.spool, self.rounds = (
            BlobStore(self.folder / "blobs"),
            Spool(self.folder / "spool"),
            OpenRounds(),
        )
        self.jobs, self.link = Jobs(self.engine, self.blobs, lambda _bundle: None), FakeLink()
        deps = FleetDependencies(self.rounds, self.jobs, self.blobs, self.spool, self.link)
        self.messages = self.thread.call(RegionMessages, deps, self.thread.loop, self.send)

    def kill(self):
        self.thread.call(self.messages.close)
        self.engine.dispose()

    async def send(self, one):
        self.sent.put(
            (one.job, one.round, one.note.device, one.note.reason, one.path.read_bytes() if one.path else None)
        )
        return await asyncio.to_thread(self.states.get, timeout=WAIT_S)

    def take(self, number, device="a", content=b"model"):
        ref = self.blobs.put(content)  # as if a device had made the region fetch it
        self.messages.take("relay-1", number, Message(device=device, deliver=Deliver(
            job="relay-1", round=number, envelope="{}", content=ref, content_blake3="00",
            bundle=Signed(text="", key_id="", signature=""), deadline_s=600.0, max_update_bytes=100,
        )))  # fmt: skip
        return ref.sha256

    def reply(self, number, data=b"reply", device="a"):
        """As the service does with a device's upload."""
        opened = self.rounds.get("relay-1", number)
        arrival = Arrival(self.spool, "relay-1", number, device, 0)
        arrival.last = data
        incoming = arrival.write()

        def keep(one):
            incoming.place()
            self.jobs.record("relay-1", number, one)

        accepted = opened.accept(AnswerRow(device=device, file=incoming.name, weight=0.0), keep)
        arrival.end()
        return accepted

    def until(self, predicate):
        async def wait():
            async with asyncio.timeout(WAIT_S):
                while not predicate():
                    await asyncio.to_thread(lambda: None)

        self.thread.run(wait())


@pytest.fixture
def region(tmp_path):
    made = Region(tmp_path)
    yield made
    made.kill()
    made.thread.close()


STORED, STALE = pb.UploadState(status="STORED"), pb.UploadState(status="STALE")


def test_a_message_is_announced_and_its_reply_sent_once(region):
    region.take(1)
    region.take(1)  # the stream begins again
    assert [(device, one.round) for device, one in region.link.told] == [("a", 1)]
    assert region.rounds.get("relay-1", 1).waits_for("a")
    assert region.reply(1)
    assert region.sent.get(timeout=WAIT_S) == ("relay-1", 1, "a", "", b"reply")
    region.states.put(STORED)
    region.until(lambda: region.messages.is_over("relay-1", 1))
    assert region.rounds.get("relay-1", 1) is None
    assert not region.spool.file("relay-1", 1, "a").exists()
    assert region.sent.empty()


def test_a_device_that_fails_has_its_reason(region):
    region.take(1)
    region.rounds.get("relay-1", 1).accept(
        AnswerRow(device="a", reason="no memory"), lambda one: region.jobs.record("relay-1", 1, one)
    )
    assert region.sent.get(timeout=WAIT_S) == ("relay-1", 1, "a", "no memory", None)
    region.states.put(STALE)
    region.until(lambda: region.messages.is_over("relay-1", 1))


def test_a_reply_survives_a_kill_of_the_region(region):
    region.take(1)
    region.reply(1)
    region.sent.get(timeout=WAIT_S)  # under way, when the region dies
    region.kill()
    region.states.put(STALE)
    region.start()
    region.take(1)
    assert region.link.told == []  # the device has replied
    assert region.sent.get(timeout=WAIT_S) == ("relay-1", 1, "a", "", b"reply")
    region.states.put(STORED)
    region.until(lambda: region.messages.is_over("relay-1", 1))


def test_what_nobody_waits_for_is_closed_and_a_relay_that_ends_leaves_nothing(region):
    first = region.take(1)
    region.take(2, device="b")
    region.messages.take("relay-1", 1, None)
    assert region.link.told[-1] == ("a", RoundClosed(job="relay-1", round=1, job_ended=False))
    assert region.messages.is_over("relay-1", 1)
    assert not region.messages.is_over("relay-1", 2)
    region.messages.keep_only(["other"])
    assert region.link.closed()[-2:] == [("a", 2, True), ("b", 2, True)]
    assert region.rounds.all() == []
    assert not region.blobs.has(first)
    assert not region.messages.is_over("relay-1", 1)  # forgotten: the job itself has ended


def test_a_content_that_messages_share_is_kept_while_one_needs_it(region):
    shared = region.take(1)
    assert region.take(2, device="b") == shared
    region.messages.take("relay-1", 1, None)
    other = region.take(3, content=b"next model")
    assert region.blobs.has(shared)
    region.messages.take("relay-1", 2, None)
    region.take(4, device="b", content=b"next model")
    assert (region.blobs.has(shared), region.blobs.has(other)) == (False, True)
