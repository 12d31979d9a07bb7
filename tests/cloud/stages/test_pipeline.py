"""Requests through scripted stages: merged, overlapped, limited, and each settled whatever happens."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cloud.stages.work import RequestRefused
from edgefl.errors import ConfigError
from tests.cloud.stages.conftest import rows, values_of


async def settle() -> None:
    """Let what is ready happen."""
    for _ in range(5):
        await asyncio.sleep(0)


def refusal(request):
    """Return status and reason of a refused request."""
    with pytest.raises(RequestRefused) as refused:
        request.settled.result()
    return refused.value.status, str(refused.value)


def test_a_request_by_hand(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, (stage,)):
            request = pipeline.submit("a", rows(1, 2))
            assert stage.rows() == [[1, 2]]
            stage.finish()
            assert values_of(request.settled.result()) == [3, 5]

    asyncio.run(run())


def test_requests_of_devices_are_merged_while_the_stage_computes(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, (stage,)):
            requests = [pipeline.submit(device, rows(value)) for value, device in enumerate("abcd")]
            assert stage.rows() == [[0]]
            requests.append(pipeline.submit("e", rows(4)))  # four wait: a batch that cannot grow is sent ahead
            assert stage.rows() == [[0], [1, 2, 3, 4]]
            stage.finish()
            stage.finish()
            assert [values_of(one.settled.result()) for one in requests] == [[1], [3], [5], [7], [9]]
            assert (pipeline.num_batches, pipeline.num_rows) == (2, 5)

    asyncio.run(run())


def test_rows_that_depend_on_each_other_are_not_merged(scripted) -> None:
    async def run():
        async with scripted(unmerged="its rows depend on each other") as (pipeline, (stage,)):
            first, _, third = (pipeline.submit("a", rows(*range(count))) for count in (9, 1, 1))
            assert [len(one) for one in stage.rows()] == [9, 1]  # two at a time, nine rows in one
            stage.finish()
            assert len(values_of(first.settled.result())) == 9
            stage.finish()
            stage.finish()
            assert values_of(third.settled.result()) == [1]

    asyncio.run(run())


def test_a_large_request_is_in_both_stages_at_the_same_time(scripted) -> None:
    async def run():
        async with scripted(2) as (pipeline, (first, second)):
            request = pipeline.submit("a", rows(*range(10)))
            assert first.rows() == [[0, 1, 2, 3], [4, 5, 6, 7]]
            first.finish()
            assert (first.rows(), second.rows()) == ([[4, 5, 6, 7]], [[1, 3, 5, 7]])
            first.finish()
            assert first.rows() == [[8, 9]]
            first.finish()
            for _ in range(3):
                second.finish()
            assert values_of(request.settled.result()) == [4 * value + 3 for value in range(10)]

    asyncio.run(run())


def test_a_slow_second_stage_stops_the_first(scripted) -> None:
    async def run():
        async with scripted(2, device_requests=1000) as (pipeline, (first, second)):
            requests = [pipeline.submit("a", rows(*range(4))) for _ in range(20)]
            while first.given:
                first.finish()
            assert (len(second.given), pipeline._slots.num_free) == (2, 0)  # the other slots wait before it
            while not all(one.is_over for one in requests):
                (second if second.given else first).finish()
            assert pipeline._slots.num_free == 5

    asyncio.run(run())


def test_one_request_that_fails_does_not_fail_those_merged_with_it(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, (stage,)):
            requests = [pipeline.submit(device, rows(value)) for value, device in enumerate("abc")]
            stage.finish()
            assert stage.rows() == [[1, 2]]
            stage.fail("an index is out of range")
            assert stage.rows() == [[1], [2]]  # each alone
            stage.fail("an index is out of range")
            stage.finish()
            assert values_of(requests[2].settled.result()) == [5]
            status, reason = refusal(requests[1])
            assert status == "INVALID_ARGUMENT"
            assert reason == (
                "stage 1 cannot compute this request (check the request's values): an index is out of range"
            )

    asyncio.run(run())


def test_a_request_that_needs_too_much_memory_is_told_so(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, (stage,)):
            request = pipeline.submit("a", rows(1))
            stage.fail("bad_alloc", memory=True)
            status, reason = refusal(request)
            assert status == "RESOURCE_EXHAUSTED"
            assert "the stage lacks memory for it; send fewer rows" in reason
            with pytest.raises(RequestRefused, match="needs 800000 bytes at a time; at most 524288 are computed"):
                pipeline.submit("a", {"t0": np.zeros((1, 200_000), np.float32)})

    asyncio.run(run())


def test_a_dead_stage_costs_what_it_computed_and_nothing_else(scripted) -> None:
    async def run():
        async with scripted(2) as (pipeline, (first, second)):
            lost = pipeline.submit("a", rows(*range(4)))
            first.finish()
            inside = pipeline.submit("b", rows(1))
            second.die()
            assert refusal(lost) == (
                "UNAVAILABLE", "stage 2 was lost while it had this request: it was killed. Send it again",
            )  # fmt: skip
            assert pipeline.reason == "stage 2: it was killed"
            first.finish()  # goes on, and waits for the second stage
            assert not inside.is_over
            second.come_up()
            second.finish()
            assert values_of(inside.settled.result()) == [7]
            assert pipeline._slots.num_free == 5

    asyncio.run(run())


def test_a_device_that_ends_the_process_twice_is_refused_and_others_are_not(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, (stage,)):
            for _ in range(2):
                pipeline.submit("bad", rows(1))
                stage.die()
                stage.come_up()
            with pytest.raises(RequestRefused, match="ended 2 times while it computed a request of device bad"):
                pipeline.submit("bad", rows(1))
            good = pipeline.submit("good", rows(1))
            stage.finish()
            assert values_of(good.settled.result()) == [3]

    asyncio.run(run())


def test_suspects_are_computed_alone(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, (stage,)):
            pipeline.submit("x", rows(0))
            for device in "ab":
                pipeline.submit(device, rows(0))
            stage.finish()
            stage.die()  # a and b were merged
            stage.come_up()
            for value, device in enumerate("abcd"):
                pipeline.submit(device, rows(value))
            assert stage.rows() == [[0], [1]]  # a, b
            stage.finish()
            stage.finish()
            assert stage.rows() == [[2, 3]]  # c and d are no suspects

    asyncio.run(run())


def test_a_deadline_is_kept_in_the_queue_and_in_the_stage(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, (stage,)):
            computed, waiting = pipeline.submit("a", rows(1), 0.02), pipeline.submit("b", rows(2), 0.01)
            other = pipeline.submit("c", rows(3))
            await asyncio.wait([computed.settled, waiting.settled])
            assert refusal(waiting) == ("DEADLINE_EXCEEDED", "the request took longer than 0.01 s")
            assert refusal(computed)[0] == "DEADLINE_EXCEEDED"
            stage.finish()  # its result has no taker
            assert stage.rows() == [[3]]  # the one that was over is not computed
            stage.finish()
            assert values_of(other.settled.result()) == [7]
            with pytest.raises(RequestRefused, match="time was over when it arrived"):
                pipeline.submit("a", rows(1), 0.0)

    asyncio.run(run())


def test_a_cancelled_request_leaves_the_queue(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, (stage,)):
            pipeline.submit("a", rows(1))
            task = asyncio.create_task(pipeline.infer("b", rows(2)))
            await settle()
            assert len(pipeline._queues[0]) == 1
            task.cancel()
            await settle()
            assert len(pipeline._queues[0]) == 0
            stage.finish()
            assert stage.rows() == []

    asyncio.run(run())


def test_limits_of_a_device_and_of_all(scripted) -> None:
    async def run():
        async with scripted(device_requests=3, device_bytes=100, all_bytes=150) as (pipeline, (stage,)):
            held = [pipeline.submit("a", rows(1)) for _ in range(3)]
            with pytest.raises(RequestRefused, match="device a has 3 requests waiting here, the most") as refused:
                pipeline.submit("a", rows(1))
            assert refused.value.status == "RESOURCE_EXHAUSTED"
            pipeline.submit("b", rows(1))
            with pytest.raises(RequestRefused, match="of device b would have 104 bytes; allowed: 100"):
                pipeline.submit("b", rows(*range(12)))
            pipeline.submit("c", rows(*range(12)))
            with pytest.raises(RequestRefused, match="that wait here have 128 bytes, of at most 150; try later"):
                pipeline.submit("d", rows(*range(12)))
            while stage.given:
                stage.finish()
            await settle()
            assert all(one.is_over for one in held)
            assert (pipeline._loads, pipeline._held_bytes) == ({}, 0)

    asyncio.run(run())


def test_it_waits_for_others_while_it_is_told_to(scripted) -> None:
    async def run():
        async with scripted(max_wait_s=0.02) as (pipeline, (stage,)):
            pipeline.submit("a", rows(1))
            pipeline.submit("b", rows(2))
            assert stage.rows() == []
            await asyncio.sleep(0.03)
            assert stage.rows() == [[1, 2]]

    asyncio.run(run())


def test_requests_are_refused_when_it_stops(scripted) -> None:
    async def run():
        async with scripted() as (pipeline, _):
            requests = [pipeline.submit("a", rows(1)) for _ in range(3)]
        for one in requests:
            assert refusal(one)[0] == "UNAVAILABLE"

    asyncio.run(run())


def test_a_model_that_does_not_load_is_an_error_of_the_start(scripted, monkeypatch) -> None:
    from edgefl.errors import ProtocolError
    from tests.cloud.stages.conftest import ScriptedStage

    async def fail(self) -> None:
        self.first_load.set_exception(ProtocolError("stage 1 does not start: no model"))
        await asyncio.Event().wait()

    monkeypatch.setattr(ScriptedStage, "run", fail)

    async def run():
        async with scripted():
            pass

    with pytest.raises(ConfigError, match="model m cannot be served: stage 1 does not start: no model"):
        asyncio.run(run())


def test_requests_that_begin_later_take_turns_with_those_of_earlier_stages(scripted) -> None:
    async def run():
        async with scripted(2, entries=(0, 1), max_rows=1) as (pipeline, (first, second)):
            whole = [pipeline.submit("a", rows(number)) for number in range(4)]
            for _ in range(3):
                first.finish()
            late = [pipeline.submit("b", {"t1": rows(number)["t0"]}, entry=1) for number in (100, 101)]
            order = []
            while second.given:
                order += second.rows()[0]
                second.finish()
                if first.given:
                    first.finish()
            assert order == [1, 3, 100, 5, 101, 7]
            assert [values_of(one.settled.result()) for one in late] == [[201.0], [203.0]]
            assert [values_of(one.settled.result()) for one in whole] == [[3.0], [7.0], [11.0], [15.0]]

    asyncio.run(run())
