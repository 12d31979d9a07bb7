"""Work of several calls that a thread does together."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloud.uploads import group_commit
from cloud.uploads.group_commit import GroupCommit


class Batches:
    """Doubles numbers, when it may; `bad` ones fail, and a negative one fails its whole batch."""

    def __init__(self):
        self.seen, self.has_begun, self.may_go_on = [], threading.Event(), threading.Event()

    def __call__(self, pieces):
        self.seen.append(list(pieces))
        self.has_begun.set()
        assert self.may_go_on.wait(10)
        if min(pieces) < 0:
            raise RuntimeError("a bug")
        return [ValueError(f"{one} is bad") if one % 10 == 9 else 2 * one for one in pieces]


def run(scenario):
    async def main():
        work = Batches()
        with ThreadPoolExecutor(2) as workers:
            async with asyncio.timeout(10):
                await scenario(GroupCommit(work, workers), work)

    asyncio.run(main())


async def submitted(commits, work, first, others):
    """Submit one piece, and others while it is worked on."""
    tasks = [asyncio.create_task(commits.submit(first))]
    await asyncio.to_thread(work.has_begun.wait)
    tasks += [asyncio.create_task(commits.submit(one)) for one in others]
    await asyncio.sleep(0)  # each submits when it runs first
    return tasks


def test_one_that_comes_alone_does_not_wait_and_those_that_come_meanwhile_go_together():
    async def scenario(commits, work):
        tasks = await submitted(commits, work, 1, (2, 3, 4))
        assert work.seen == [[1]]
        work.may_go_on.set()
        assert await asyncio.gather(*tasks) == [2, 4, 6, 8]
        assert work.seen == [[1], [2, 3, 4]]

    run(scenario)


def test_a_failure_is_that_of_its_piece_alone():
    async def scenario(commits, work):
        tasks = await submitted(commits, work, 1, (2, 9, 3))
        work.may_go_on.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[:2] + done[3:] == [2, 4, 6]
        assert isinstance(done[2], ValueError)

    run(scenario)


def test_an_error_of_the_work_itself_is_everybodys_and_the_next_batch_goes_on():
    async def scenario(commits, work):
        tasks = await submitted(commits, work, -1, (2,))
        work.may_go_on.set()
        with pytest.raises(RuntimeError, match="a bug"):
            await tasks[0]
        assert await tasks[1] == 4

    run(scenario)


def test_a_caller_that_is_cancelled_does_not_hold_up_the_others():
    async def scenario(commits, work):
        tasks = await submitted(commits, work, 1, (2, 3))
        for one in tasks[:2]:
            one.cancel()
        work.may_go_on.set()
        assert await tasks[2] == 6
        assert [one.cancelled() for one in tasks] == [True, True, False]

    run(scenario)


def test_a_batch_is_bounded(monkeypatch):
    monkeypatch.setattr(group_commit, "MAX_BATCH", 2)

    async def scenario(commits, work):
        tasks = await submitted(commits, work, 1, (2, 3, 4))
        work.may_go_on.set()
        await asyncio.gather(*tasks)
        assert work.seen == [[1], [2, 3], [4]]

    run(scenario)


def test_workers_that_take_no_work_are_an_error_of_each_call_and_not_for_ever():
    async def main():
        work, workers = Batches(), ThreadPoolExecutor(1)
        work.may_go_on.set()
        commits = GroupCommit(work, workers)
        assert await commits.submit(1) == 2
        workers.shutdown()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shutdown"):
                await commits.submit(2)

    asyncio.run(main())
