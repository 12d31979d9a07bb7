"""A region's connection to its parent: it comes back by itself, fetches whole blobs once, sends until answered."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import wait

import pytest

from edgefl.errors import ManifestRejected
from edgefl.protocols.tiers import SumNote
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
