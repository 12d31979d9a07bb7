"""Bundles: verified before anything is unpacked, kept for the rounds to come."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import pytest

from edge_agent.link.channel import CloudChannel
from edge_agent.link.profile import load_profile
from edge_agent.training import bundles as bundles_module
from edge_agent.training.bundles import MAX_KEPT, Bundles, work_folder
from edgefl.errors import ManifestRejected
from edgefl.protocols.manifest import Bundle, load_public_key, new_fleet_key, sign, verify


@pytest.fixture
def with_bundles(home):
    def run(function):
        async def inside():
            channel = CloudChannel(load_profile(home), home)
            try:
                return await function(Bundles(home, load_public_key((home / "fleet.pub").read_bytes()), channel))
            finally:
                await channel.close()

        return asyncio.run(inside())

    return run


def downloads(fleet) -> int:
    return len([call for call in fleet.calls if call.startswith("download")])


def test_a_bundle_is_fetched_once_in_a_process(fleet, home, with_bundles):
    signed = fleet.bundle()

    async def run(bundles):
        first, task = await bundles.get(signed)
        assert task == "user_task:task"
        assert first.read_bytes() in fleet.blobs.values()
        assert (await bundles.get(signed))[0] == first

    with_bundles(run)
    assert downloads(fleet) == 1
    remains = next((home / "bundles").glob("*.zip"))
    remains.write_bytes(b"changed on the disk")
    with_bundles(run)  # a new process trusts nothing that lay there
    assert downloads(fleet) == 2


def test_a_signature_is_checked_once_and_another_text_again(fleet, with_bundles, monkeypatch):
    signed, checks = fleet.bundle(), []

    def watched(*arguments):
        checks.append(arguments)
        return verify(*arguments)

    monkeypatch.setattr(bundles_module, "verify", watched)

    async def run(bundles):
        for _ in range(3):
            await bundles.get(signed)
        with pytest.raises(ManifestRejected):
            await bundles.get(dataclasses.replace(signed, text=signed.text.replace("user_task", "other")))
        await bundles.get(signed)

    with_bundles(run)
    assert len(checks) == 2


@pytest.mark.parametrize("damage", ["key", "text", "size"])
def test_a_bundle_that_is_not_the_fleets_is_not_kept(fleet, home, with_bundles, damage):
    signed = fleet.bundle()
    if damage == "key":
        signed = sign(verify(signed, Bundle, fleet.key.public_key()), new_fleet_key())
    elif damage == "text":
        signed = dataclasses.replace(signed, text=signed.text.replace("user_task", "evil_task"))
    else:
        facts = verify(signed, Bundle, fleet.key.public_key())
        huge = dataclasses.replace(facts.blob, size=bundles_module.MAX_ARCHIVE_BYTES + 1)
        signed = sign(dataclasses.replace(facts, blob=huge), fleet.key)

    async def run(bundles):
        with pytest.raises(ManifestRejected):
            await bundles.get(signed)

    with_bundles(run)
    assert downloads(fleet) == 0
    assert list((home / "bundles").iterdir()) == []


def test_the_oldest_are_forgotten(fleet, home, with_bundles, monkeypatch):
    monkeypatch.setattr(bundles_module, "MAX_KEPT", 2)
    signed = [fleet.bundle(f"x = {number}") for number in range(3)]

    async def run(bundles):
        paths = [(await bundles.get(one))[0] for one in signed]
        assert [path.exists() for path in paths] == [False, True, True]

    with_bundles(run)


def test_a_task_finds_its_folder_again_and_the_oldest_go(tmp_path):
    first = work_folder(tmp_path, tmp_path / "0.zip")
    (first / "cache").write_text("kept")
    assert work_folder(tmp_path, tmp_path / "0.zip") == first
    assert (first / "cache").read_text() == "kept"
    os.utime(first, (0, 0))
    folders = [work_folder(tmp_path, tmp_path / f"{number}.zip") for number in range(1, MAX_KEPT + 1)]
    assert sorted(one.name for one in (tmp_path / "tasks").iterdir()) == sorted(one.name for one in folders)
