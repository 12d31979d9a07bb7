"""The outbox: nothing leaves the store before the cloud has answered for it."""

from __future__ import annotations

import asyncio

import pytest
from blake3 import blake3

from edge_agent.link import outbox as outbox_module
from edge_agent.link.channel import CloudChannel
from edge_agent.link.outbox import Outbox
from edge_agent.link.profile import load_profile
from edge_agent.link.transfer import upload
from edge_agent.store import FailureNote, Outgoing, Store
from edgefl.errors import HomeError
from edgefl.protocols import fleet_pb2 as pb


class Sender:
    """An outbox on a real store and channel."""

    def __init__(self, home, until) -> None:
        self.until = until
        self.store = Store(home)
        self.channel = CloudChannel(load_profile(home), home)
        self.outbox = Outbox(self.store, self.channel)

    def put(self, number: int = 1, size: int = 1000) -> None:
        draft = self.store.draft("j", number)
        draft.write_bytes(bytes(size))
        digest = blake3(bytes(size)).hexdigest()
        self.outbox.put(Outgoing(job="j", round=number, path=draft, size=size, blake3=digest, weight=1.0))


@pytest.fixture
def with_sender(home, until):
    def run(function):
        async def inside():
            sender = Sender(home, until)
            running = asyncio.create_task(sender.outbox.run())
            try:
                return await function(sender)
            finally:
                running.cancel()
                [ended] = await asyncio.gather(running, return_exceptions=True)
                await sender.channel.close()
                sender.store.close()
                assert isinstance(ended, asyncio.CancelledError), ended

        return asyncio.run(inside())

    return run


@pytest.mark.parametrize("status", [pb.UploadState.STORED, pb.UploadState.STALE, pb.UploadState.REFUSED])
def test_what_the_cloud_has_answered_for_is_dropped(fleet, with_sender, status):
    fleet.answer = pb.UploadState(status=status, reason="because")

    async def run(sender):
        sender.put()
        await sender.until(lambda: not sender.store.outbox())
        assert sender.store.is_answered("j", 1)

    with_sender(run)


def test_updates_and_failures_go_in_their_order(fleet, with_sender):
    async def run(sender):
        sender.outbox.put_failure(FailureNote(job="j", round=9, reason="why"))
        for number in (1, 2):
            sender.put(number)
        await sender.until(lambda: not sender.store.outbox() and not sender.store.failures())

    with_sender(run)
    assert fleet.failures == {("j", 9): "why"}
    assert [call for call in fleet.calls if call == "stored" or call.startswith("fail")] == [
        "fail j 9",
        "stored",
        "stored",
    ]


def test_after_a_restart_the_cloud_is_asked_first(fleet, home, with_sender):
    store = Store(home)
    draft = store.draft("j", 1)
    draft.write_bytes(b"abc")
    digest = blake3(b"abc").hexdigest()
    store.put(Outgoing(job="j", round=1, path=draft, size=3, blake3=digest, weight=1.0))
    store.close()

    async def run(sender):
        await sender.until(lambda: not sender.store.outbox())

    with_sender(run)
    assert [call for call in fleet.calls if not call.startswith("chunk")] == ["resume j 1", "upload j 1 0", "stored"]


def test_a_closed_round_is_dropped_in_mid_upload(fleet, with_sender):
    async def run(sender):
        loop, reached = asyncio.get_running_loop(), asyncio.Event()
        fleet.before_chunk = lambda _way, _offset: loop.call_soon_threadsafe(reached.set)
        sender.put(1, size=64 << 20)
        await reached.wait()
        sender.outbox.drop("j", 1)
        assert sender.store.outbox() == []
        fleet.before_chunk = lambda *_: None
        sender.put(2)
        await sender.until(lambda: ("j", 2) in fleet.updates)

    with_sender(run)
    assert ("j", 1) not in fleet.updates


def test_a_round_that_was_never_answered_can_be_dropped(with_sender):
    async def run(sender):
        sender.outbox.drop("j", 1)
        assert sender.store.is_answered("j", 1)

    with_sender(run)


def test_a_database_that_cannot_be_read_for_a_while_is_asked_again(fleet, with_sender, monkeypatch):
    monkeypatch.setattr(outbox_module, "RETRY_S", 0.01)

    async def run(sender):
        read, faults = sender.store.failures, [HomeError("locked")] * 3

        def failures():
            if faults:
                raise faults.pop()
            return read()

        monkeypatch.setattr(sender.store, "failures", failures)
        sender.put()
        await sender.until(lambda: not sender.store.outbox())
        assert faults == []

    with_sender(run)


def test_an_update_that_cannot_be_read_for_a_while_is_sent_later(fleet, with_sender, monkeypatch):
    monkeypatch.setattr(outbox_module, "RETRY_S", 0.01)
    faults = [OSError(24, "Too many open files")] * 3

    async def send(*arguments, **named):
        if faults:
            raise faults.pop()
        return await upload(*arguments, **named)

    monkeypatch.setattr(outbox_module, "upload", send)

    async def run(sender):
        sender.put()
        await sender.until(lambda: not sender.store.outbox())

    with_sender(run)


def test_a_reason_with_a_lone_surrogate_reaches_the_cloud(fleet, with_sender):
    async def run(sender):
        await sender.channel.fail(pb.UpdateKey(job="j", round=1), "no such file: \udcff\x1b[2J")

    with_sender(run)


def test_a_parent_that_was_not_asked_for_an_update_may_be_left_with_it(fleet, with_sender):
    """It may never be asked: the device has another parent by now."""
    fleet.not_asked = "this region has not been asked for the device's part in this round yet"

    async def run(sender):
        assert sender.outbox.may_leave()
        sender.put(1)
        assert not sender.outbox.may_leave()
        await sender.until(sender.outbox.may_leave)
        assert sender.store.outbox()
        fleet.not_asked = ""
        sender.outbox.wake()
        await sender.until(lambda: not sender.store.outbox())
        assert sender.outbox.may_leave()

    with_sender(run)
    assert ("j", 1) in fleet.updates
