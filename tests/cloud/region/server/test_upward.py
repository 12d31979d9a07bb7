"""What a region passes on: the latest of each device, telemetry in batches, nothing of devices that are gone."""

from __future__ import annotations

import asyncio

import pytest

from cloud.region.server.upward import Upward
from edgefl.errors import ProtocolError
from edgefl.process.log_tail import MAX_BYTES
from edgefl.protocols import tiers
from edgefl.protocols.messages import DeviceState, RolloutNote, Telemetry, decode
from edgefl.protocols.tiers import LogSent


def telemetry(load):
    return Telemetry(
        cpu_count=4, cpu_percent=5.0, load_1m=load, ram_total_mb=8000.0, ram_available_mb=1.0, disk_free_mb=9e4
    )


def state(*, online=True):
    return DeviceState(session=1, online=online, agent_version="1")


class Parent:
    """What a parent has been told: all entries, by a stream of the mirror."""

    def __init__(self, upward):
        self._mirror = upward.mirror

    def entries(self):
        async def read():
            found = {}
            async for item in self._mirror.items():
                if item.complete:
                    return found
                found[item.key] = item.value
            raise AssertionError("the stream ended before it was complete")

        return asyncio.run(read())

    def load(self, device):
        return decode(Telemetry, self.entries()[f"telemetry/{device}"]).load_1m


def test_telemetry_is_passed_on_at_once_and_then_at_intervals():
    upward = Upward()
    parent = Parent(upward)
    upward.note_state("a", state())
    upward.note_telemetry("a", telemetry(1.0))
    assert parent.load("a") == 1.0
    for load in (2.0, 3.0):
        upward.note_telemetry("a", telemetry(load))
    assert parent.load("a") == 1.0
    upward.report_telemetry()
    assert parent.load("a") == 3.0
    upward.report_telemetry()
    assert parent.load("a") == 3.0


@pytest.mark.parametrize("gone", [lambda up: up.note_state("a", state(online=False)), lambda up: up.forget("a")])
def test_of_a_device_that_is_gone_no_telemetry_is_left(gone):
    upward = Upward()
    for load in (1.0, 2.0):
        upward.note_telemetry("a", telemetry(load))
    gone(upward)
    upward.report_telemetry()
    assert "telemetry/a" not in Parent(upward).entries()
    upward.note_telemetry("a", telemetry(5.0))  # it is back
    assert Parent(upward).load("a") == 5.0


def test_a_device_that_is_out_of_reach_is_no_longer_spoken_of():
    """It did not say that it is offline, so the parent waits longer for it."""
    upward = Upward()
    upward.note_state("a", state())
    upward.note_telemetry("a", telemetry(1.0))
    upward.note_lost("a", state(online=False))
    assert Parent(upward).entries() == {}
    upward.note_state("a", state())
    assert "state/a" in Parent(upward).entries()


def test_the_run_reports_at_intervals(monkeypatch):
    monkeypatch.setattr("cloud.region.server.upward.TELEMETRY_S", 0.01)
    upward = Upward()
    for load in (1.0, 2.0):
        upward.note_telemetry("a", telemetry(load))

    async def run():
        task = asyncio.create_task(upward.run())
        async with asyncio.timeout(20):
            async for item in upward.mirror.items():
                if item.key and decode(Telemetry, item.value).load_1m == 2.0:
                    break
        task.cancel()

    asyncio.run(run())


def test_what_a_removed_device_said_is_taken_back_and_nothing_else():
    upward = Upward()
    woken = []
    upward.on_state = lambda: woken.append(1)
    for device in ("a", "ab"):
        upward.note_state(device, state())
        upward.note_telemetry(device, telemetry(1.0))
        upward.note_rollout(device, RolloutNote(model="m", version=1, state="active"))
        upward.note_serial(device, "2a")
    upward.pass_on("region/r2", b"{}")
    upward.forget("a")
    assert sorted(Parent(upward).entries()) == [
        "note/ab/m", "region/r2", "serial/a", "serial/ab", "state/ab", "telemetry/ab",
    ]  # fmt: skip
    upward.pass_on("region/r2", None)
    assert "region/r2" not in Parent(upward).entries()
    assert woken == [1, 1]


def test_the_end_of_a_log():
    upward = Upward()
    upward.receive("a", "id", b"one\ntwo\xff", cut=True)
    sent = tiers.unpack(LogSent, Parent(upward).entries()["log/a"])
    assert (sent.request, sent.text, sent.cut) == ("id", "one\ntwo\ufffd", True)
    with pytest.raises(ProtocolError, match="at most"):
        upward.receive("a", "id", bytes(MAX_BYTES + 1), cut=False)
