"""Certificates are renewed periodically while the cloud serves, also after a failed renewal."""

import asyncio

import pytest

from cloud.trust.upkeep import LONGEST_S, Upkeep, interval_s
from edgefl.errors import HomeError


def test_the_interval_leaves_several_attempts_for_a_renewal():
    assert interval_s(397) == LONGEST_S
    assert interval_s(0.01) == pytest.approx(43.2)


def test_each_renewal_is_followed_by_a_reload_and_repeated_after_an_error(caplog):
    results = iter([None, OSError("disk full"), HomeError("no key"), None])
    reasons = []

    def renew():
        if (error := next(results, None)) is not None:
            raise error

    async def run():
        enough = asyncio.Event()

        def reload():
            reasons.append(upkeep.reason)
            if len(reasons) == 5:
                enough.set()

        upkeep = Upkeep(renew, reload, lambda: 0.001, pytest.fail)
        async with upkeep.running():
            await asyncio.wait_for(enough.wait(), 10)
        assert [task for task in asyncio.all_tasks() if task.get_name() == "certificates"] == []

    asyncio.run(run())
    assert reasons[:5] == ["", "", "disk full", "no key", ""]
    assert "disk full" in caplog.text


def test_a_bug_is_passed_to_on_failure():
    async def run():
        failure = asyncio.get_running_loop().create_future()
        async with Upkeep(lambda: 1 // 0, print, lambda: 0.001, failure.set_result).running():
            assert isinstance(await asyncio.wait_for(failure, 10), ZeroDivisionError)

    asyncio.run(run())
