"""Certificates are looked at while the cloud serves, whatever becomes of one look."""

import asyncio

import pytest

from cloud.upkeep import LONGEST_S, interval_s, looked_after
from edgefl.errors import HomeError


def test_the_interval_leaves_several_looks_for_a_renewal():
    assert interval_s(397) == LONGEST_S
    assert interval_s(0.01) == pytest.approx(43.2)


def test_a_renewal_is_followed_by_a_reload_and_a_fault_by_the_next_look(caplog):
    looks = iter([False, OSError("disk full"), HomeError("no key"), True])

    def look():
        result = next(looks)
        if isinstance(result, Exception):
            raise result
        return result

    async def run():
        reloaded = asyncio.Event()
        async with looked_after(look, reloaded.set, 0.001):
            await asyncio.wait_for(reloaded.wait(), 10)
        assert [task for task in asyncio.all_tasks() if task.get_name() == "certificates"] == []

    asyncio.run(run())
    assert "disk full" in caplog.text
    assert "no key" in caplog.text
