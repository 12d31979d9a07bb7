"""A placed model with a stage server that fails in every way: who answers, by when, and what the response says."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from edge_agent.placement.breaker import CLOSED, OPEN
from edge_agent.placement.link_meter import EXPECTED
from edge_agent.placement.placed_model import PARTS, Unanswered
from edgefl.errors import ProtocolError
from tests.edge_agent.placement.conftest import IN_CLOUD, SPLIT, WHOLE, answer, compute, inputs

WRONG = ("FAILED_PRECONDITION", "NOT_FOUND")  # the next request would fail, too


async def infer(model, feeds=None, timeout_s=None):
    found = await model.infer(("y",), feeds or inputs(), timeout_s, compute)
    return found.results[0], dict(found.parameters)


@pytest.mark.parametrize("candidates", [(SPLIT,), (IN_CLOUD,), (WHOLE,)])
def test_every_placement_computes_what_the_model_does(placed, expected, candidates) -> None:
    async def run():
        async with placed(*candidates) as (model, server, _):
            for rows in (1, 3):
                result, parameters = await infer(model, inputs(rows))
                np.testing.assert_allclose(result, expected("whole", inputs(rows)), rtol=1e-5)
                assert parameters == {"placement": candidates[0].name}
            assert len(server.seen) == (0 if candidates == (WHOLE,) else 4)  # one row, then three apart
            assert {one.model_name for one in server.seen} <= {f"m.{candidates[0].layers}"}
            assert (len(model.meter._device) > len(EXPECTED)) == (candidates[0] != IN_CLOUD)  # measured with one row

    asyncio.run(run())


def test_parts_of_a_request_are_on_their_way_at_the_same_time_and_stay_in_order(placed, expected) -> None:
    async def run():
        async with placed() as (model, server, _):
            await infer(model)
            server.delay_s = 0.05
            result, _ = await infer(model, inputs(21))
            np.testing.assert_allclose(result, expected("whole", inputs(21)), rtol=1e-5)
            assert server.most == PARTS
        async with placed(divides=False) as (model, server, _):
            result, _ = await infer(model, inputs(21))
            np.testing.assert_allclose(result, expected("whole", inputs(21)), rtol=1e-5)
            assert len(server.seen) == 1

    asyncio.run(run())


@pytest.mark.parametrize("status", [*WRONG, "UNAVAILABLE", "INTERNAL", "RESOURCE_EXHAUSTED"])
@pytest.mark.parametrize("rows", [1, 9])
def test_when_the_tail_fails_the_fall_back_answers_and_says_so(placed, expected, status, rows) -> None:
    async def run():
        async with placed() as (model, server, _):
            server.fault = status
            result, parameters = await infer(model, inputs(rows))
            np.testing.assert_allclose(result, expected("small", inputs(rows)), rtol=1e-5)
            assert parameters == {"placement": "fallback", "fallback_reason": f"{status}: as the test wishes"}
            assert model.breaker.state == (OPEN if status in WRONG else CLOSED)
            assert (model.counts.fallback, dict(model.counts.reasons)) == (1, {status: 1})

    asyncio.run(run())


def test_an_exit_behind_the_head_is_a_fall_back_too(placed, files, expected) -> None:
    async def run():
        async with placed(fallback="exit") as (model, server, _):
            server.fault = "UNAVAILABLE"
            result, parameters = await infer(model, inputs(2))
            hidden = np.maximum(inputs(2)["x"] @ np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32), 0)
            np.testing.assert_allclose(result, expected("exit", {"h": hidden}), rtol=1e-5)
            assert parameters["placement"] == "fallback"

    asyncio.run(run())


def test_a_tail_that_says_nothing_is_given_up_in_time(placed, expected) -> None:
    """The server would answer after a minute; the request's own time is what counts."""

    async def run():
        async with placed() as (model, server, _):
            await infer(model)
            server.delay_s = 60
            result, parameters = await infer(model, timeout_s=0.5)
            np.testing.assert_allclose(result, expected("small", inputs()), rtol=1e-5)
            assert parameters["fallback_reason"].startswith("no answer within")
            assert server.timeouts_s[-1] <= 0.5  # the deadline has travelled with it, as a duration
            assert server.seen[-1].parameters["timeout"].int64_param <= 500_000
            assert model.breaker.state == CLOSED  # a client's short time is not the tail's fault

    asyncio.run(run())


def test_three_requests_that_time_out_by_the_release_s_own_limit_open_the_breaker(placed) -> None:
    async def run():
        async with placed(timeout_ms=200.0) as (model, server, _):
            server.delay_s = 60
            for _ in range(3):
                await infer(model)
            assert model.breaker.state == OPEN
            asked = len(server.seen)
            for _ in range(50):
                _, parameters = await infer(model)
                assert parameters["placement"] == "fallback"
            assert len(server.seen) == asked  # nothing is sent to a tail that fails

    asyncio.run(run())


def test_a_time_that_is_too_short_for_the_cloud_asks_nobody(placed) -> None:
    async def run():
        async with placed() as (model, server, _):
            _, parameters = await infer(model, timeout_s=0.001)
            assert parameters["fallback_reason"] == "the request's time is too short for the cloud"
            assert server.seen == []

    asyncio.run(run())


def test_without_a_fall_back_the_whole_model_answers_or_nobody(placed, expected) -> None:
    async def run():
        async with placed(SPLIT, WHOLE, fallback=None) as (model, server, _):
            server.fault = "UNAVAILABLE"
            result, parameters = await infer(model)
            np.testing.assert_allclose(result, expected("whole", inputs()), rtol=1e-5)
            assert parameters["placement"] == "device"
        async with placed(fallback=None) as (model, server, _):
            server.fault = "UNAVAILABLE"
            with pytest.raises(Unanswered, match="model m did not answer, and it has no fall-back: UNAVAILABLE"):
                await infer(model)
            assert model.counts.refused == 1
            server.fault = None
            await infer(model)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda request: answer(request, np.zeros((1, 3), np.float32), name="z"), "has no output 'y'"),
        (lambda request: answer(request, np.zeros((1, 4), np.float32)), "has shape [1, 4], expected [-1, 3]"),
    ],
)
def test_answers_that_do_not_fit_are_not_passed_on(placed, wrong, words) -> None:
    async def run():
        async with placed() as (model, server, _):
            server.fault = wrong
            _, parameters = await infer(model)
            assert parameters["placement"] == "fallback"
            assert words in parameters["fallback_reason"]
            assert model.breaker.state == OPEN

    asyncio.run(run())


def test_nan_is_the_client_s_own_fault_and_touches_nobody_else(placed) -> None:
    async def run():
        async with placed() as (model, server, _):
            with pytest.raises(ProtocolError, match=r"tensor 'h' .* has NaN"):
                await infer(model, {"x": np.full((1, 4), np.nan, np.float32)})
            assert server.seen == []
            assert model.breaker.state == CLOSED
            assert (await infer(model))[1] == {"placement": "split:Relu_h"}

    asyncio.run(run())


def test_a_cascade_sends_only_the_rows_of_which_the_small_model_is_not_sure(placed, expected) -> None:
    async def run():
        async with placed(threshold=0.8) as (model, server, _):
            feeds = inputs(40)
            small = expected("small", feeds)
            soft = np.exp(small - small.max(1, keepdims=True))
            hard = soft.max(1) / soft.sum(1) < 0.8
            assert 0 < hard.sum() < 40
            result, parameters = await infer(model, feeds)
            wanted = np.where(hard[:, None], expected("whole", feeds), small)
            np.testing.assert_allclose(result, wanted, rtol=1e-4)
            assert parameters == {"placement": "split:Relu_h", "cascade_rows": int((~hard).sum())}
            server.seen.clear()
            easy = {"x": feeds["x"][~hard]}
            _, parameters = await infer(model, easy)
            assert parameters == {"placement": "fallback", "cascade_rows": int((~hard).sum())}
            assert server.seen == []
            server.fault = "UNAVAILABLE"
            result, parameters = await infer(model, feeds)
            np.testing.assert_allclose(result, small, rtol=1e-5)
            assert parameters["fallback_reason"] == "UNAVAILABLE: as the test wishes"

    asyncio.run(run())


def test_a_server_that_is_killed_in_mid_request_costs_that_request_s_cloud_and_nothing_else(placed, expected) -> None:
    async def run():
        async with placed() as (model, server, process):
            await infer(model)
            server.delay_s = 60
            waiting = [asyncio.ensure_future(infer(model, inputs(seed=seed))) for seed in range(5)]
            while server.running < 5:  # noqa: ASYNC110 - a test looks from outside
                await asyncio.sleep(0.002)
            await process.grpc.stop(None)
            for seed, one in enumerate(waiting):
                result, parameters = await one
                np.testing.assert_allclose(result, expected("small", inputs(seed=seed)), rtol=1e-5)
                assert parameters["placement"] == "fallback"
            assert model.breaker.state == OPEN

    asyncio.run(run())


def test_a_model_that_is_replaced_finishes_its_requests_first(placed, expected) -> None:
    async def run():
        async with placed() as (model, server, _):
            await infer(model)
            server.delay_s = 0.3
            waiting = asyncio.ensure_future(infer(model, inputs(7)))
            while not server.running:  # noqa: ASYNC110 - a test looks from outside
                await asyncio.sleep(0.002)
            await model.close()
            result, parameters = await waiting
            assert parameters == {"placement": "split:Relu_h"}
            np.testing.assert_allclose(result, expected("whole", inputs(7)), rtol=1e-5)
            assert (await infer(model))[1]["fallback_reason"] == "the model was replaced by another version"

    asyncio.run(run())
