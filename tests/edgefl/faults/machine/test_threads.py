"""Threads on fibers have the standard library's contracts: locks exclude, conditions wake, queues keep their order."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import CancelledError

import pytest

from edgefl.faults.machine import threads
from edgefl.faults.machine.kernel import Kernel, Node


@pytest.fixture
def node(tmp_path):
    kernel = Kernel(3)
    threads.enter(kernel)
    made = Node(kernel, "n", tmp_path)
    made.loop.executor = threads.SimExecutor()
    yield made
    threads.leave()
    kernel.close()


def run(node, *works):
    for work in works:
        node.spawn(work, work.__name__)
    node.kernel.run(lambda: False, 1000.0)
    assert node.kernel.problems == []


def test_a_lock_admits_one_at_a_time_whatever_the_order(node):
    lock, inside, most = threads.SimLock(), [], []

    def work():
        for _ in range(20):
            with lock:
                inside.append(1)
                most.append(len(inside))
                node.kernel.wait(None, 0.1)
                inside.pop()

    run(node, work, work, work)
    assert len(most) == 60
    assert max(most) == 1


def test_a_reentrant_lock_is_free_after_as_many_releases(node):
    lock = threads.SimRLock()

    def work():
        with lock, lock:
            assert lock.locked()
        assert not lock.locked()

    run(node, work)


def test_an_event_loop_lets_the_holder_of_a_lock_finish_first(node):
    lock, seen = threads.SimLock(), []

    def thread():
        with lock:
            for _ in range(50):
                node.kernel.give_way()
            seen.append("thread")

    def in_loop():
        with lock:
            seen.append("loop")

    node.kernel.call_at(0.0, lambda: node.loop.call_soon(in_loop))
    run(node, thread)
    assert sorted(seen) == ["loop", "thread"]


def test_a_condition_wakes_and_times_out_on_the_virtual_clock(node):
    changed, seen = threads.SimCondition(), []

    def waits():
        with changed:
            seen.append(changed.wait_for(lambda: len(seen) == 1, 5.0))
            seen.append(node.kernel.now_s)

    def wakes():
        node.kernel.wait(None, 2.0)
        with changed:
            seen.append("woken")
            changed.notify_all()

    run(node, waits, wakes)
    assert seen == ["woken", True, 2.0]

    def late():
        begin_s = node.kernel.now_s
        with changed:
            seen.append(changed.wait_for(lambda: False, 3.0))
        seen.append(node.kernel.now_s - begin_s)

    run(node, late)
    assert seen[-2:] == [False, pytest.approx(3.0, abs=1e-5)]


def test_a_queue_keeps_the_order_and_is_empty_after_the_timeout(node):
    items, seen = threads.SimQueue(), []

    def takes():
        seen.extend(items.get() for _ in range(3))
        with pytest.raises(queue.Empty):
            items.get(timeout=1.0)
        seen.append(items.empty())

    def puts():
        for number in range(3):
            node.kernel.wait(None, 0.1)
            items.put(number)

    run(node, takes, puts)
    assert seen == [0, 1, 2, True]


def test_an_executor_runs_at_most_so_many_at_once_and_passes_errors_on(node):
    executor, inside, most, futures = threads.SimExecutor(2), [], [], []

    def work(number):
        inside.append(number)
        most.append(len(inside))
        node.kernel.wait(None, 1.0)
        inside.remove(number)
        return 10 // number

    def asks():
        futures.extend(executor.submit(work, number) for number in (5, 2, 0, 1))
        assert futures[0].result() == 2
        with pytest.raises(ZeroDivisionError):
            futures[2].result()
        with pytest.raises(TimeoutError):
            executor.submit(work, 1).result(0.1)

    run(node, asks)
    assert max(most) == 2


def test_a_future_that_did_not_begin_can_be_cancelled(node):
    executor, seen = threads.SimExecutor(1), []

    def asks():
        executor.submit(lambda: node.kernel.wait(None, 1.0))
        waiting = executor.submit(lambda: seen.append("ran"))
        executor.shutdown(cancel_futures=True)
        with pytest.raises(CancelledError):
            waiting.result()
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(asks)

    run(node, asks)
    assert seen == []


def test_a_thread_waits_for_a_coroutine_in_the_loop(node):
    seen = []

    async def work():
        await asyncio.sleep(2)
        return node.kernel.now_s

    def asks():
        seen.append(threads.run_coroutine_threadsafe(work(), node.loop).result())

    run(node, asks)
    assert seen == [2.0]


def test_a_coroutine_waits_for_a_thread(node):
    seen = []

    async def work():
        seen.append(await asyncio.to_thread(lambda: 7))
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    node.kernel.call_in(node, lambda: node.loop.create_task(work()))
    run(node)
    assert seen == [7]


def test_join_and_event(node):
    event, seen = threads.SimEvent(), []

    def child():
        event.wait()
        seen.append("child")

    def parent():
        thread = threads.SimThread(child)
        thread.start()
        assert thread.is_alive()
        event.set()
        thread.join(10.0)
        assert not thread.is_alive()
        seen.append("parent")

    run(node, parent)
    assert seen == ["child", "parent"]
