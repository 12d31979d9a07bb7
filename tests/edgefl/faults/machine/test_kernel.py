"""The scheduler: virtual time, an order that follows from the seed, fibers that wait, and kills that leave nothing."""

from __future__ import annotations

import asyncio

import pytest

from edgefl.faults.machine import threads
from edgefl.faults.machine.kernel import Kernel, Node, Stuck


@pytest.fixture
def kernel(tmp_path):
    made = Kernel(1)
    threads.enter(made)
    yield made
    threads.leave()
    made.close()


def node(kernel, tmp_path, name="n"):
    made = Node(kernel, name, tmp_path)
    made.loop.executor = threads.SimExecutor()
    return made


def test_time_moves_only_when_nobody_can_run_and_then_to_the_next_timer(kernel, tmp_path):
    seen = []

    async def work():
        await asyncio.sleep(3600)
        seen.append(asyncio.get_running_loop().time())

    one = node(kernel, tmp_path)
    kernel.call_in(one, lambda: one.loop.create_task(work()))
    assert not kernel.run(lambda: False, 10_000.0)
    assert seen == [3600.0]


def test_a_node_keeps_the_order_of_its_callbacks(kernel, tmp_path):
    seen = []
    one = node(kernel, tmp_path)
    for number in range(30):
        one.loop.call_soon(seen.append, number)
    kernel.run(lambda: False, 1.0)
    assert seen == list(range(30))


def order_of(seed, tmp_path):
    kernel, seen = Kernel(seed), []
    for name in ("a", "b", "c"):
        one = Node(kernel, name, tmp_path)
        for number in range(30):
            one.loop.call_soon(seen.append, f"{name}{number}")
    kernel.run(lambda: False, 1.0)
    kernel.close()
    return seen


def test_the_seed_alone_decides_the_order_of_nodes(tmp_path):
    assert order_of(1, tmp_path) == order_of(1, tmp_path)
    assert len({tuple(order_of(seed, tmp_path)) for seed in range(5)}) == 5


def test_no_code_of_a_killed_node_runs_any_more(kernel, tmp_path):
    seen = []

    async def work():
        try:
            while True:
                await asyncio.sleep(1)
                seen.append("loop")
        finally:
            seen.append("cleanup")

    def thread():
        while True:
            kernel.wait(None, 1.0)
            seen.append("thread")

    one = node(kernel, tmp_path)
    kernel.call_in(one, lambda: one.loop.create_task(work()))
    one.spawn(thread, "thread")
    kernel.call_at(2.5, lambda: kernel.kill(one))
    kernel.run(lambda: False, 10.0)
    assert sorted(seen) == ["loop", "loop", "thread", "thread"]


def test_a_paused_node_catches_up(kernel, tmp_path):
    seen = []
    one, other = node(kernel, tmp_path, "one"), node(kernel, tmp_path, "other")
    one.paused_until_s = 5.0
    for each in (one, other):
        each.loop.call_later(1.0, lambda name=each.name: seen.append((name, kernel.now_s)))
    kernel.run(lambda: False, 10.0)
    assert seen == [("other", 1.0), ("one", 5.0)]


def test_an_event_loop_that_waits_in_a_blocking_call_is_reported(kernel, tmp_path):
    one = node(kernel, tmp_path)
    kernel.call_in(one, lambda: kernel.wait(None, 1.0))
    kernel.run(lambda: False, 1.0)
    assert any("blocking call" in one for one in kernel.problems)


def test_an_error_that_nobody_handles_is_a_problem(kernel, tmp_path):
    one = node(kernel, tmp_path)
    one.spawn(lambda: 1 / 0, "divides")
    kernel.run(lambda: False, 1.0)
    assert "thread divides of n raised ZeroDivisionError" in kernel.problems[0]


def test_a_run_of_too_many_steps_ends(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr("edgefl.faults.machine.kernel._MAX_STEPS", 50)
    one = node(kernel, tmp_path)

    def again():
        one.loop.call_soon(again)

    kernel.call_in(one, again)
    with pytest.raises(Stuck, match="50 steps without an end"):
        kernel.run(lambda: False, 1.0)
