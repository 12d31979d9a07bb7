"""The queue before the stages: turns by hand, fairness as a law, and what a batch may hold."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.stages.fair_queue import BatchRule, FairQueue
from cloud.stages.work import Part, StageRequest


@pytest.fixture
def part():
    """Make a part of one request; a request needs a loop for its future, which is not run."""
    loop = asyncio.new_event_loop()

    def make(device, rows=1, features=1, at_s=0.0, *, alone=False):
        tensors = {"x": np.zeros((rows, features), np.float32)}
        request = StageRequest(device, tensors, at_s, settled=loop.create_future())
        return Part(request, 0, tensors, rows, request.num_bytes, alone=alone)

    yield make
    loop.close()


def devices(batch):
    return [one.request.device for one in batch]


def test_devices_take_turns_whatever_they_send(part) -> None:
    queue = FairQueue(BatchRule(max_rows=2))
    for device in "aaaaaab":
        queue.put(part(device))
    assert devices(queue.take(0, is_idle=True)) == ["a", "b"]  # b has sent least
    assert devices(queue.take(0, is_idle=True)) == ["a", "a"]
    assert len(queue) == 3


def test_a_device_of_large_requests_gets_the_same_bytes(part) -> None:
    queue = FairQueue(BatchRule(max_rows=1))
    for _ in range(4):
        queue.put(part("large", features=30))
    for _ in range(12):
        queue.put(part("small", features=10))
    order = [devices(queue.take(0, is_idle=True))[0] for _ in range(8)]
    assert order.count("large") == 2  # 2 * 30 = 6 * 10


def test_an_idle_device_saves_no_turns_up(part) -> None:
    queue = FairQueue(BatchRule(max_rows=1))
    for _ in range(10):
        queue.put(part("busy"))
    for _ in range(5):
        queue.take(0, is_idle=True)
    for _ in range(10):
        queue.put(part("late"))
    order = [devices(queue.take(0, is_idle=True))[0] for _ in range(6)]
    assert Counter(order) == {"busy": 3, "late": 3}


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 20)), min_size=1, max_size=80))
def test_two_waiting_devices_get_the_same_bytes_up_to_one_part_each(sizes) -> None:
    loop = asyncio.new_event_loop()
    queue = FairQueue(BatchRule(max_rows=1))
    left: Counter[str] = Counter()
    for device, features in sizes:
        tensors = {"x": np.zeros((1, features), np.float32)}
        request = StageRequest(device, tensors, 0.0, settled=loop.create_future())
        queue.put(Part(request, 0, tensors, 1, request.num_bytes))
        left[device] += 1
    served: Counter[str] = Counter()
    largest = 4 * max(features for _, features in sizes)
    while batch := queue.take(0, is_idle=True):
        (one,) = batch
        served[one.request.device] += one.cost
        left[one.request.device] -= 1
        waiting = [served[device] for device, count in left.items() if count]
        assert not waiting or max(waiting) - min(waiting) <= 2 * largest
    assert sum(served.values()) == sum(4 * features for _, features in sizes)
    assert len(queue) == 0
    loop.close()


def test_a_batch_holds_rows_of_the_same_shape_and_no_more_than_it_may(part) -> None:
    queue = FairQueue(BatchRule(max_rows=4))
    for one in (part("a", 2), part("b", 1, features=9), part("c", 3), part("d", 1)):
        queue.put(one)
    batches = [queue.take(0, is_idle=True) for _ in range(3)]
    assert [devices(batch) for batch in batches] == [["a"], ["b"], ["c", "d"]]  # c does not fit beside a: a is full
    assert len(queue) == 0


def test_a_batch_holds_no_more_bytes_than_it_may(part) -> None:
    queue = FairQueue(BatchRule(max_rows=100, max_bytes=100))
    for _ in range(3):
        queue.put(part("a", features=10))
    assert len(queue.take(0, is_idle=False)) == 2  # 80 of 100 bytes; another 40 do not fit
    assert len(queue.take(0, is_idle=True)) == 1


def test_what_is_alone_is_alone(part) -> None:
    queue = FairQueue(BatchRule(max_rows=4))
    for device, alone in (("a", False), ("b", True), ("c", False)):
        queue.put(part(device, alone=alone))
    assert devices(queue.take(0, is_idle=True)) == ["a", "c"]
    assert devices(queue.take(0, is_idle=False)) == ["b"]  # it cannot grow


def test_a_batch_that_may_grow_waits_while_the_stage_computes(part) -> None:
    queue = FairQueue(BatchRule(max_rows=2))
    queue.put(part("a"))
    assert queue.take(0, is_idle=False) == []
    queue.put(part("b"))
    assert devices(queue.take(0, is_idle=False)) == ["a", "b"]


def test_it_waits_for_more_rows_as_long_as_the_rule_says(part) -> None:
    queue = FairQueue(BatchRule(max_rows=2, max_wait_s=0.5))
    queue.put(part("a", at_s=10.0))
    assert queue.take(10.4, is_idle=True) == []
    assert queue.due_s == 10.5
    assert devices(queue.take(10.5, is_idle=True)) == ["a"]


def test_what_is_removed_is_not_taken_and_what_is_put_back_keeps_its_turn(part) -> None:
    queue = FairQueue(BatchRule(max_rows=1))
    first, second, third = (part(device) for device in "abc")
    for one in (first, second, third):
        queue.put(one)
    queue.remove(second)
    queue.remove(second)
    (taken,) = queue.take(0, is_idle=True)
    assert taken is first
    queue.remove(taken)  # it does not wait: nothing happens
    queue.put_back(taken)
    assert len(queue) == 2
    assert queue.take(0, is_idle=True) == [first]
    assert queue.take(0, is_idle=True) == [third]
    assert queue.take(0, is_idle=True) == []


def test_removed_parts_are_not_kept_while_nothing_is_taken(part) -> None:
    queue = FairQueue(BatchRule(max_rows=4))
    queue.put(stays := part("a"))
    for _ in range(2000):
        queue.put(gone := part("b"))
        queue.remove(gone)
    assert len(queue._order) <= 300
    assert len(queue) == 1
    assert queue.take(0, is_idle=True) == [stays]


def test_it_forgets_devices_that_are_gone(part) -> None:
    queue = FairQueue(BatchRule(max_rows=1))
    for number in range(1000):
        queue.put(part(f"d{number}"))
        queue.take(0, is_idle=True)
    assert len(queue._finish) <= 300
