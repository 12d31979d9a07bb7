"""Blobs down and updates up, over a real channel that breaks where a test wants it to."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os

import pytest
from blake3 import blake3

from edge_agent.link import transfer
from edge_agent.link.channel import CloudChannel
from edge_agent.link.profile import load_profile
from edge_agent.link.transfer import download, upload
from edge_agent.store import Outgoing
from edgefl.errors import CloudUnreachable, ManifestRejected
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import BlobRef


@pytest.fixture
def over_channel(home):
    """Run a coroutine function with a channel to the fleet."""

    def run(function):
        async def inside():
            channel = CloudChannel(load_profile(home), home)
            try:
                return await function(channel)
            finally:
                await channel.close()

        return asyncio.run(inside())

    return run


@pytest.fixture
def breaks(fleet):
    """Make the first transfers of a way end at given offsets, once each."""

    def at(way: str, *offsets: int) -> None:
        left = list(offsets)

        def before_chunk(seen: str, offset: int) -> None:
            if seen == way and left and offset >= left[0]:
                left.pop(0)
                raise ConnectionError("the test breaks this transfer")

        fleet.before_chunk = before_chunk

    return at


def update_of(tmp_path, size: int) -> Outgoing:
    path = tmp_path / "update"
    path.write_bytes(os.urandom(size))
    digest = blake3(path.read_bytes()).hexdigest()
    return Outgoing(job="j", round=1, path=path, size=size, blake3=digest, weight=2.0, metrics={"loss": 0.5})


@pytest.mark.parametrize("size", [1, 1000, (1 << 20), (3 << 20) + 17])
def test_a_blob_comes_whole(fleet, over_channel, tmp_path, size):
    data = os.urandom(size)
    ref = fleet.blob(data)
    over_channel(lambda channel: download(channel, ref, tmp_path / "blob"))
    assert (tmp_path / "blob").read_bytes() == data
    assert not (tmp_path / "blob.part").exists()


def test_a_broken_download_goes_on_where_it_was(fleet, over_channel, breaks, tmp_path):
    data = os.urandom(5 << 20)
    ref = fleet.blob(data)
    breaks("down", 2 << 20, 4 << 20)
    over_channel(lambda channel: download(channel, ref, tmp_path / "blob"))
    assert (tmp_path / "blob").read_bytes() == data
    assert [int(call.split()[2]) for call in fleet.calls] == [0, 2 << 20, 4 << 20]


def test_a_new_process_goes_on_where_the_old_one_was(fleet, over_channel, tmp_path):
    data = os.urandom(3 << 20)
    ref = fleet.blob(data)
    (tmp_path / "blob.part").write_bytes(data[: 2 << 20])
    over_channel(lambda channel: download(channel, ref, tmp_path / "blob"))
    assert (tmp_path / "blob").read_bytes() == data
    assert [int(call.split()[2]) for call in fleet.calls] == [2 << 20]


@pytest.mark.parametrize("size", [1 << 20, 2 << 20, 3 << 20])
def test_damaged_remains_are_fetched_again(fleet, over_channel, tmp_path, size):
    data = os.urandom(2 << 20)
    ref = fleet.blob(data)
    (tmp_path / "blob.part").write_bytes(b"x" * size)
    over_channel(lambda channel: download(channel, ref, tmp_path / "blob"))
    assert (tmp_path / "blob").read_bytes() == data


def test_a_whole_part_is_not_fetched_again(fleet, over_channel, tmp_path):
    data = os.urandom(1 << 20)
    ref = fleet.blob(data)
    (tmp_path / "blob.part").write_bytes(data)
    over_channel(lambda channel: download(channel, ref, tmp_path / "blob"))
    assert (tmp_path / "blob").read_bytes() == data
    assert fleet.calls == []


@pytest.mark.parametrize("old_size", [1 << 20, 1000])
def test_an_unwanted_file_is_overwritten_where_it_has_the_size(fleet, over_channel, tmp_path, old_size):
    data = os.urandom(1 << 20)
    ref = fleet.blob(data)
    old = tmp_path / "old"
    old.write_bytes(b"o" * old_size)
    inode = old.stat().st_ino
    over_channel(lambda channel: download(channel, ref, tmp_path / "blob", reuse=old))
    assert (tmp_path / "blob").read_bytes() == data
    assert not old.exists()
    if old_size == len(data):
        assert (tmp_path / "blob").stat().st_ino == inode


@pytest.mark.parametrize("wrong", [b"wrong bytes, right size" + b"." * 77, b"short", b"long" * 100])
def test_other_bytes_than_promised_are_refused(fleet, over_channel, tmp_path, wrong, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_IDLE_ATTEMPTS", 2)
    digest = hashlib.sha256(b"y" * 100).hexdigest()
    fleet.blobs[digest] = wrong
    with pytest.raises((ManifestRejected, CloudUnreachable)):
        over_channel(lambda channel: download(channel, BlobRef(sha256=digest, size=100), tmp_path / "blob"))
    assert not (tmp_path / "blob").exists()


def test_a_blob_that_is_gone_is_refused_at_once(fleet, over_channel, tmp_path):
    with pytest.raises(CloudUnreachable, match="NOT_FOUND: no such blob"):
        over_channel(lambda channel: download(channel, BlobRef(sha256="0" * 64, size=9), tmp_path / "blob"))
    assert len(fleet.calls) == 1


@pytest.mark.parametrize("size", [1, 1000, (9 << 20) + 3])
def test_an_update_goes_whole(fleet, over_channel, tmp_path, size):
    update = update_of(tmp_path, size)
    state = over_channel(lambda channel: upload(channel, update, resume=False))
    header, data = fleet.updates["j", 1]
    assert state.status == pb.UploadState.STORED
    assert data == update.path.read_bytes()
    assert (header.weight, dict(header.metrics), header.size) == (2.0, {"loss": 0.5}, size)
    assert "resume j 1" not in fleet.calls


def test_a_broken_upload_asks_and_goes_on(fleet, over_channel, breaks, tmp_path):
    update = update_of(tmp_path, 13 << 20)
    breaks("up", 4 << 20, 8 << 20)
    over_channel(lambda channel: upload(channel, update, resume=False))
    assert fleet.updates["j", 1][1] == update.path.read_bytes()
    assert [call for call in fleet.calls if not call.startswith("chunk")] == [
        "upload j 1 0", "resume j 1", f"upload j 1 {4 << 20}", "resume j 1", f"upload j 1 {8 << 20}", "stored",
    ]  # fmt: skip


def test_an_update_that_the_cloud_has_is_not_sent_again(fleet, over_channel, tmp_path):
    update = update_of(tmp_path, 1000)
    over_channel(lambda channel: upload(channel, update, resume=False))
    state = over_channel(lambda channel: upload(channel, update, resume=True))
    assert state.status == pb.UploadState.STORED
    assert fleet.calls[-1] == "resume j 1"


@pytest.mark.parametrize("status", [pb.UploadState.STALE, pb.UploadState.REFUSED, pb.UploadState.STORED])
def test_an_early_answer_ends_the_upload(fleet, over_channel, tmp_path, status):
    fleet.answer = pb.UploadState(status=status, reason="because")
    update = update_of(tmp_path, 20 << 20)
    state = over_channel(lambda channel: upload(channel, update, resume=False))
    assert (state.status, state.reason) == (status, "because")


def test_a_cloud_that_never_gets_further_is_given_up(fleet, over_channel, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_IDLE_ATTEMPTS", 2)
    fleet.answer = pb.UploadState(status=pb.UploadState.PARTIAL, offset=0)
    with pytest.raises(CloudUnreachable, match="given up at byte 0 after 2 attempts"):
        over_channel(lambda channel: upload(channel, update_of(tmp_path, 1000), resume=False))


def test_a_restart_of_the_cloud_in_mid_download(fleet, over_channel, tmp_path):
    data = os.urandom(4 << 20)
    ref = fleet.blob(data)
    restarted = []

    async def run(channel):
        loop = asyncio.get_running_loop()

        def restart():
            fleet.stop()
            fleet.start()

        def before_chunk(way, offset):
            if offset == 2 << 20 and not restarted:
                restarted.append(asyncio.run_coroutine_threadsafe(asyncio.to_thread(restart), loop))
                raise ConnectionError

        fleet.before_chunk = before_chunk
        await download(channel, ref, tmp_path / "blob")
        await asyncio.wrap_future(restarted[0])

    over_channel(run)
    assert (tmp_path / "blob").read_bytes() == data


def test_an_upload_that_waits_for_a_dead_parent_goes_to_the_next_one_at_once(fleet, home, tmp_path, free_port):
    """gRPC's own wait for a connection does not end with its call."""
    there, update = load_profile(home), update_of(tmp_path, 3000)
    dead = dataclasses.replace(there, grpc=f"127.0.0.1:{free_port}")

    async def run():
        channel = CloudChannel(dead, home)
        try:
            sending = asyncio.create_task(upload(channel, update, resume=False))
            await asyncio.sleep(0.1)  # it waits
            await channel.switch(there)
            async with asyncio.timeout(transfer.STALL_S / 2):
                return await sending
        finally:
            await channel.close()

    assert asyncio.run(run()).status == pb.UploadState.STORED
    assert fleet.updates["j", 1][1] == update.path.read_bytes()


def test_a_status_of_a_newer_cloud_is_no_end_of_the_agent(fleet, over_channel, tmp_path):
    fleet.answer = pb.UploadState(status=77)
    update = update_of(tmp_path, 1000)
    with pytest.raises(CloudUnreachable, match="status 77, unknown to this agent"):
        over_channel(lambda channel: upload(channel, update, resume=False))
