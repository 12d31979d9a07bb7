"""A region's connection to its parent: it comes back by itself, fetches whole blobs once, sends until answered."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor, wait

import grpc
import pytest

from cloud.region.server import uplink as module
from cloud.region.server.uplink import MAX_UNKNOWN, REFUSED_FIRST_S
from edgefl.errors import EnrolmentRefused, ManifestRejected
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import fleet_pb2_grpc as rpc
from edgefl.protocols.tiers import SumNote
from edgefl.protocols.tls import grpc_server_credentials
from tests.cloud.region.conftest import WAIT_S


def until(predicate):
    end_s = time.monotonic() + WAIT_S
    while not predicate():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_it_comes_back_by_itself(tiers):
    uplink = tiers.uplink("r1")
    assert uplink.reason == "it has not connected yet"
    until(lambda: not uplink.reason)
    tiers.stop()
    until(lambda: uplink.reason)
    tiers.start()
    until(lambda: not uplink.reason)
    assert uplink.copy.is_complete


def test_a_stranger_and_a_device_are_told_why(tiers, caplog):
    uplink = tiers.uplink("a")
    until(lambda: "certificate of 'a' is that of a device" in uplink.reason)
    assert "cloud token --role region" in uplink.reason


def test_a_model_is_fetched_once_for_all_who_want_it(tiers):
    opened = tiers.open()
    uplink = tiers.uplink("r1")
    ref = opened.assignment.model

    async def all_at_once():
        await asyncio.gather(*(uplink.fetch(ref.sha256) for _ in range(20)))

    tiers.thread.run(all_at_once())
    assert ref.size <= uplink.down_bytes < 1.1 * ref.size
    tiers.thread.run(uplink.fetch(ref.sha256))
    assert uplink.down_bytes < 1.1 * ref.size


def test_a_download_is_resumed_and_a_damaged_one_thrown_away(tiers):
    opened = tiers.open()
    ref, uplink = opened.assignment.model, tiers.uplink("r1")
    part = tiers.folder / "uplinks" / "r1" / "downloads" / f"{ref.sha256}.part"
    data = tiers.blobs.path(ref.sha256).read_bytes()
    part.write_bytes(bytes(1_000_000))
    with pytest.raises(ManifestRejected, match="does not match its hash"):
        tiers.thread.run(uplink.fetch(ref.sha256))
    assert not part.exists()
    part.write_bytes(data[:1_500_000])
    before = uplink.down_bytes
    tiers.thread.run(uplink.fetch(ref.sha256))
    assert uplink.down_bytes - before == ref.size - 1_500_000


def test_a_full_disk_holds_a_download_up_until_there_is_space(tiers):
    ref, uplink = tiers.open().assignment.model, tiers.uplink("r1")
    part = tiers.folder / "uplinks" / "r1" / "downloads" / f"{ref.sha256}.part"
    part.symlink_to("/dev/full")

    async def freed():
        fetching = asyncio.create_task(uplink.fetch(ref.sha256))
        await asyncio.sleep(0.3)
        assert not fetching.done()
        part.unlink()
        await fetching

    tiers.thread.run(freed())
    assert (tiers.folder / "uplinks" / "r1" / "blobs" / ref.sha256).exists()


def test_a_blob_that_nobody_has(tiers):
    uplink = tiers.uplink("r1")
    with pytest.raises(FileNotFoundError, match="no blob"):
        tiers.thread.run(uplink.fetch("0" * 64))


def test_a_sum_waits_for_a_parent_that_is_away(tiers):
    tiers.open()
    uplink = tiers.uplink("r1")
    until(lambda: not uplink.reason)
    tiers.stop()
    one = tiers.sum_file(SumNote(weights={"a": 1.0, "b": 3.0}), tiers.mean())
    sending = asyncio.run_coroutine_threadsafe(uplink.send(one), tiers.thread.loop)
    assert not wait([sending], 1.0).done
    tiers.start()
    assert sending.result(WAIT_S).status == 1  # STORED
    assert tiers.yielded() == ["a", "b"]


class OtherParent(rpc.TierServicer):
    """A parent of another version: it counts the calls."""

    def __init__(self, metadata):
        self.metadata, self.attached, self.others = metadata, 0, 0

    def Attach(self, _requests, context):  # noqa: N802 - gRPC's name
        self.attached += 1
        context.send_initial_metadata(self.metadata)
        yield pb.TierItem(key="member/a", value=b"what may be")
        yield pb.TierItem(complete=True)
        while context.is_active():
            time.sleep(0.05)

    def Upload(self, _requests, context):  # noqa: N802
        self.others += 1
        context.abort(grpc.StatusCode.UNKNOWN, "")

    Resume = Upload


def served(tiers, parent=None):
    """Serve another parent, or one that serves no regions, with TLS; return the server and its port."""
    server, own = grpc.server(ThreadPoolExecutor(4)), tiers.identity("server")
    if parent is not None:
        rpc.add_TierServicer_to_server(parent, server)
    port = server.add_secure_port("127.0.0.1:0", grpc_server_credentials(own))
    server.start()
    return server, port


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ((), "runs edgefl of an unknown version and speaks version 0 .*Update the parent 127.0.0.1"),
        ((("edgefl-tier-protocol", "2"), ("edgefl-version", "9.1")), "runs edgefl 9.1 .*Update region 'r1'"),
    ],
)
def test_a_parent_of_another_version_is_refused_in_words_and_seldom_asked_again(tiers, metadata, words):
    parent, heard, begun_s = OtherParent(metadata), [], time.monotonic()
    server, port = served(tiers, parent)
    uplink = tiers.uplink("r1", on_change=lambda *said: heard.append(said), port=port)
    until(lambda: re.search(words, uplink.reason))
    one = tiers.sum_file(SumNote(weights={"a": 1.0, "b": 3.0}), tiers.mean())
    sending = asyncio.run_coroutine_threadsafe(uplink.send(one), tiers.thread.loop)
    until(lambda: parent.attached == 2)
    assert time.monotonic() - begun_s >= REFUSED_FIRST_S  # no storm: the second attempt came after the first delay
    assert (heard, parent.others, sending.done()) == ([], 0, False)
    sending.cancel()
    server.stop(None).wait()


def test_a_parent_that_serves_no_regions(tiers):
    server, port = served(tiers)
    uplink = tiers.uplink("r1", port=port)
    until(lambda: "of a version that serves no regions; update it" in uplink.reason)
    server.stop(None).wait()


def test_two_processes_with_one_home_are_told_and_take_turns_seldom(tiers):
    first = tiers.uplink("r1")
    until(lambda: not first.reason)
    second = tiers.uplink("r1")
    words = "another process has connected as region 'r1'. Two processes use copies of one --home"
    until(lambda: words in first.reason)
    assert "enrol it under another name" in first.reason
    until(lambda: words in second.reason)  # the first came back, after a pause


def test_a_region_that_was_removed_gives_up_after_some_refusals(tiers, monkeypatch):
    monkeypatch.setattr(module, "REFUSED_FIRST_S", 0.01)
    uplink = tiers.uplink("r1")
    until(lambda: not uplink.reason)
    tiers.enrolment.remove("r1")
    tiers.members.note_change()
    tiers.service.forget("r1")
    until(tiers.uplinks[-1].done)
    with pytest.raises(EnrolmentRefused, match=r"region 'r1' stops, .*: region 'r1' is not enrolled"):
        tiers.uplinks[-1].result()
    assert uplink._times_unknown == MAX_UNKNOWN
