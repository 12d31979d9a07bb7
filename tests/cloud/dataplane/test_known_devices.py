"""Which devices the data plane and a process beside the cloud know."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.exc import OperationalError

from cloud.dataplane import known_devices
from cloud.dataplane.known_devices import FRESH_S, KnownDevices
from edgefl.testing import ManualClock


def test_an_answer_is_fresh_for_a_second() -> None:
    clock, fleet = ManualClock(), {("a", "1")}
    known = KnownDevices(lambda *who: who in fleet, clock)
    assert not known.was_known("a", "1")
    assert known.is_known("a", "1")
    assert known.was_known("a", "1")
    assert not known.was_known("a", "2")  # another certificate
    clock.advance(FRESH_S)
    assert not known.was_known("a", "1")


def test_a_device_that_is_removed_is_not_known_any_more() -> None:
    fleet = {("a", None)}
    known = KnownDevices(lambda *who: who in fleet, ManualClock())
    assert known.is_known("a", None)
    fleet.clear()
    assert not known.is_known("a", None)
    assert not known.was_known("a", None)


def test_a_stranger_with_another_certificate_does_not_make_it_forget_the_device() -> None:
    known = KnownDevices(lambda *who: who == ("a", "1"), ManualClock())
    assert known.is_known("a", "1")
    assert not known.is_known("a", "2")
    assert known.was_known("a", "1")  # its open streams are still watched


def test_a_device_that_is_forgotten_is_asked_for_again_also_if_the_answer_was_under_way() -> None:
    clock = ManualClock()
    known = KnownDevices(lambda *_: True, clock, fresh_s=100.0)
    assert known.is_known("a", "1")
    clock.advance(99.0)
    assert known.was_known("a", "1")
    known.forget("a")
    assert not known.was_known("a", "1")

    def removed_meanwhile(device, _serial):
        slow.forget(device)
        return True

    slow = KnownDevices(removed_meanwhile, clock)
    assert slow.is_known("a", "1")
    assert not slow.was_known("a", "1")


def test_a_new_certificate_takes_the_place_of_the_former() -> None:
    known = KnownDevices(lambda *_: True, ManualClock())
    assert known.is_known("a", "1")
    assert known.is_known("a", "2")
    assert not known.was_known("a", "1")


@pytest.mark.parametrize("busy_database", [False, True])
def test_a_device_with_a_running_call_is_reported_when_it_is_removed(monkeypatch, busy_database) -> None:
    monkeypatch.setattr(known_devices, "FRESH_S", 0.001)
    fleet, faults = {"a", "b"}, [OperationalError("", {}, Exception())] if busy_database else []

    def is_known(device, serial):
        if faults and device == "b":
            raise faults.pop()
        return device in fleet

    async def run():
        known, gone = KnownDevices(is_known, asyncio.get_running_loop().time), asyncio.Queue()
        with ThreadPoolExecutor(1) as workers:
            for device in "ab":
                known._seen[device] = "1", 0.0
            watch = asyncio.create_task(known.watch(lambda: ["a", "b", "stranger"], gone.put_nowait, workers))
            fleet.discard("b")
            assert await gone.get() == "b"
            watch.cancel()
            await asyncio.wait([watch])

    asyncio.run(run())
