"""Certificates are looked at while the cloud serves, whatever becomes of one look."""

import asyncio

import pytest

from cloud.trust.upkeep import LONGEST_S, Upkeep, interval_s
from edgefl.errors import HomeError


def test_the_interval_leaves_several_looks_for_a_renewal():
    assert interval_s(397) == LONGEST_S
    assert interval_s(0.01) == pytest.approx(43.2)


def test_each_look_is_followed_by_a_reload_and_a_fault_by_the_next_look(caplog):
    looks = iter([None, OSError("disk full"), HomeError("no key"), None])
    reasons = []

    def look():
        if (error := next(looks, None)) is not None:
            raise error

    async def run():
        enough = asyncio.Event()

        def reload():
            reasons.append(upkeep.reason)
            if len(reasons) == 5:
                enough.set()

        upkeep = Upkeep(look, reload, 0.001, pytest.fail)
        async with upkeep.running():
            await asyncio.wait_for(enough.wait(), 10)
        assert [task for task in asyncio.all_tasks() if task.get_name() == "certificates"] == []

    asyncio.run(run())
    assert reasons[:5] == ["", "", "disk full", "no key", ""]
    assert "disk full" in caplog.text


def test_a_fault_of_ours_is_heard_of():
    async def run():
        heard = asyncio.get_running_loop().create_future()
        async with Upkeep(lambda: 1 // 0, print, 0.001, heard.set_result).running():
            assert isinstance(await asyncio.wait_for(heard, 10), ZeroDivisionError)

    asyncio.run(run())
