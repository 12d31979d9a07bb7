"""Releases, from the signed wish to the switch; whatever goes wrong, the old one serves on."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from edge_agent.releases.model_file import ModelFile
from edge_agent.releases.slots import ModelSlots
from edgefl.protocols.manifest import new_fleet_key
from tests.edge_agent.updater_device import Device


def test_releases_alternate_between_the_slots(home, on_device, versions):
    async def run(device):
        slots = []
        for version in (1, 2, 3):
            await device.install(versions(version))
            slots.append(ModelSlots(home / "models", "digits").state.active)
            assert device.predict() == version + 1
        assert slots == ["a", "b", "a"]
        assert device.states()[:3] == [(1, "downloading"), (1, "installed"), (1, "active")]
        assert device.changes == [{}, {"digits": 1}, {"digits": 2}, {"digits": 3}]

    on_device(run)


def test_a_release_survives_a_restart_without_the_cloud(fleet, on_device, versions):
    on_device(lambda device: device.install(versions(1), versions(2)))
    fleet.stop()

    async def run(device):
        assert device.models.versions() == {"digits": 2}
        assert device.predict() == 3

    on_device(run)


def test_an_older_version_is_refused_unless_it_is_a_rollback(fleet, on_device, versions):
    async def run(device):
        await device.install(versions(2), versions(1, sequence=3))
        assert device.predict() == 3
        assert device.notes[-1].state == "failed"
        assert "version 1 is older than the installed 2" in device.notes[-1].detail
        await device.install(versions(1, sequence=4, rollback=True))
        assert device.predict() == 2
        downloads = len(fleet.calls)
        await device.install(versions(2, sequence=5))  # its bytes lie in the other slot
        assert device.predict() == 3
        assert len(fleet.calls) == downloads

    on_device(run)


def test_a_replayed_wish_changes_nothing(on_device, versions):
    async def run(device):
        old, new = versions(1, sequence=1, rollback=True), versions(2, sequence=2)
        await device.install(old, new)
        before = list(device.notes)
        await device.install(old, new, old)
        assert device.notes == before
        assert device.predict() == 3

    on_device(run)


def test_an_outcome_is_told_once_more_after_a_restart(on_device, versions):
    on_device(lambda device: device.install(versions(1)))

    async def run(device):
        await device.install(versions(1), versions(1))
        assert device.states() == [(1, "active")]

    on_device(run)


@pytest.mark.parametrize("damage", ["key", "text", "device", "kind"])
def test_what_the_fleet_did_not_sign_for_us_is_not_even_fetched(fleet, on_device, versions, damage):
    if damage == "key":
        fleet.key, good = new_fleet_key(), fleet.key
        signed, fleet.key = versions(1), good
    elif damage == "device":
        signed = versions(1, device="cam-2")
    elif damage == "kind":
        signed = fleet.bundle()
    else:
        signed = versions(1)
        signed = dataclasses.replace(signed, text=signed.text.replace('"version":1', '"version":9'))

    async def run(device):
        await device.install(signed)
        assert device.notes == []
        assert device.models.versions() == {}

    on_device(run)
    assert not [call for call in fleet.calls if call.startswith("download")]


@pytest.mark.parametrize("damage", ["bytes", "no onnx", "does not run"])
def test_a_bad_release_fails_and_the_old_one_serves_on(fleet, on_device, onnx_model, versions, damage):
    if damage == "no onnx":
        bad = fleet.release(b"no onnx", 2, sequence=2)
    elif damage == "does not run":
        bad = fleet.release(onnx_model(2.0)[:-15], 2, sequence=2)
    else:
        bad = versions(2)
        digest = next(digest for digest in fleet.blobs if digest in bad.text)
        fleet.blobs[digest] = bytes(len(fleet.blobs[digest]))

    async def run(device):
        await device.install(versions(1), bad)
        assert device.notes[-1].state == "failed"
        assert device.notes[-1].version == 2
        assert device.notes[-1].detail
        assert device.predict() == 2
        await device.install(versions(3))
        assert device.predict() == 4

    on_device(run)
    on_device(lambda device: device.settled())


def test_a_download_goes_on_after_a_restart(fleet, home, on_device, versions):
    fleet.chunk_bytes = 64
    signed = versions(1)

    def breaks(_way, offset):
        if offset >= 128:
            raise ConnectionError

    fleet.before_chunk = breaks

    async def cut(device):
        device.updater.handle(signed)
        await device.until(lambda: len([call for call in fleet.calls if call.startswith("download")]) == 2)

    on_device(cut)
    assert (home / "models/digits/a/model.onnx.part").stat().st_size == 128
    fleet.before_chunk = lambda *_: None
    fleet.calls.clear()

    async def run(device):
        await device.install(signed)
        assert device.predict() == 2

    on_device(run)
    assert [int(call.split()[2]) for call in fleet.calls] == [128]


def test_a_damaged_slot_falls_back_and_is_mended(home, on_device, versions):
    on_device(lambda device: device.install(versions(1), versions(2)))
    (home / "models/digits/b/model.onnx").write_bytes(b"rotten")

    async def run(device):
        assert device.predict() == 2
        await device.install(versions(2))
        assert device.predict() == 3

    on_device(run)


def test_a_release_that_kills_the_agent_is_given_up(home, on_device, versions):
    on_device(lambda device: device.install(versions(1)))
    slots = ModelSlots(home / "models", "digits")
    slots.save(dataclasses.replace(slots.state, trying=2, tries=2))

    async def run(device):
        await device.install(versions(2))
        assert device.notes[-1].detail == "the agent died 2 times while it loaded this release"
        assert device.predict() == 2

    on_device(run)


def test_a_cloud_that_cannot_be_reached_puts_it_off(fleet, on_device, versions):
    signed = versions(1)
    kept, fleet.blobs = fleet.blobs, {}

    async def run(device):
        await device.install(signed)
        assert device.states() == [(1, "downloading")]
        fleet.blobs = kept
        await device.install(signed)
        assert device.predict() == 2

    on_device(run)


def test_two_models_side_by_side(on_device, versions):
    async def run(device):
        await device.install(versions(1), versions(7, model="faces", sequence=1))
        assert device.models.versions() == {"digits": 1, "faces": 7}

    on_device(run)


def test_a_newer_wish_ends_the_work_on_an_older_one(on_device, versions):
    async def run(device):
        async def hang(model):
            if model.version == 2:
                await asyncio.Event().wait()

        device.host.before_load = hang
        await device.install(versions(1))
        device.updater.handle(versions(2))
        await device.until(lambda: (2, True) in device.host.trials)
        await device.install(versions(1, sequence=3, rollback=True))
        assert device.states()[-1] == (1, "active")
        assert device.predict() == 2
        assert (2, "failed") not in device.states()

    on_device(run)


def test_a_slow_model_holds_up_no_other(on_device, versions):
    async def run(device):
        async def hang(model):
            if model.name == "slow":
                await asyncio.Event().wait()

        device.host.before_load = hang
        device.updater.handle(versions(1, model="slow"))
        device.updater.handle(versions(1))
        await device.until(lambda: device.models.versions() == {"digits": 1})

    on_device(run)


def test_a_newer_wish_ends_a_restoring_that_hangs(home, on_device, versions):
    on_device(lambda device: device.install(versions(1)))

    async def hang(model):
        if model.version == 1:
            await asyncio.Event().wait()

    async def inside(until):
        device = Device(home, until)
        device.host.before_load = hang
        running = [asyncio.create_task(device.updater.restore()), asyncio.create_task(device.updater.run())]
        await device.until(lambda: device.host.trials)
        await device.install(versions(2))
        assert device.models.versions() == {"digits": 2}
        await running[0]
        running[1].cancel()
        await asyncio.gather(running[1], return_exceptions=True)
        await device.channel.close()

    on_device(lambda device: inside(device.until))


@pytest.mark.parametrize("damage", [b"", b"{", b"[" * 100_000, b'{"model": "faces"}', b"\xff", b"null", b"7"])
def test_a_damaged_state_costs_that_model_only_and_it_is_sent_again(home, on_device, versions, damage, caplog):
    async def both(device):
        await device.install(versions(1), versions(5, model="faces", sequence=1))

    on_device(both)
    (home / "models/digits/state.json").write_bytes(damage)

    async def run(device):
        assert device.models.versions() == {"faces": 5}
        assert "release.state_damaged model=digits" in caplog.text
        await device.install(versions(1))
        assert device.predict() == 2
        assert device.states() == [(1, "downloading"), (1, "installed"), (1, "active")]

    on_device(run)
    on_device(lambda device: device.settled())


def test_a_release_that_keeps_ending_the_serving_process_makes_way_for_the_one_before(home, on_device, versions):
    async def run(device):
        await device.install(versions(1), versions(2))
        active = ModelSlots(home / "models", "digits").state.active
        failing = ModelFile(name="digits", version=2, path=home / f"models/digits/{active}/model.onnx")
        device.updater.handle_failing(failing, "it died")
        await device.until(lambda: device.predict() == 2)
        assert device.states()[-1] == (2, "failed")
        assert device.notes[-1].detail == "it died"
        device.updater.handle_failing(failing, "it died")  # late: another serves by now
        await device.install(versions(2))  # the wish that brought it is done with
        assert device.predict() == 2

    on_device(run)

    async def again(device):
        assert device.predict() == 2

    on_device(again)


@pytest.mark.parametrize(("starts", "version", "trial"), [(0, 2, False), (1, 2, True), (3, 1, False)])
def test_starts_are_counted_and_end_at_the_spare(home, on_device, versions, starts, version, trial):
    on_device(lambda device: device.install(versions(1), versions(2)))
    slots = ModelSlots(home / "models", "digits")
    slots.save(dataclasses.replace(slots.state, starts=starts))

    async def run(device):
        assert device.models.versions() == {"digits": version}
        assert device.host.trials == [(version, trial)]
        assert ModelSlots(home / "models", "digits").state.starts == 0
        await device.install(versions(2))
        assert device.models.versions() == {"digits": 2}

    on_device(run)
