"""What happens beside the requests: probes, plans and what is told. Times are the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time

import pytest

from edge_agent.placement.breaker import CLOSED, OPEN
from edge_agent.placement.keeper import MEASURE_S, PlacementKeeper, planned_model
from edgefl.offload.plans.link import LinkSpeed
from tests.edge_agent.placement.conftest import IN_CLOUD, SPLIT, WHOLE, compute, inputs

BIG = dataclasses.replace(IN_CLOUD, up_bytes=1_000_000)


def keeper_of(model, told=None):
    return PlacementKeeper(model, inputs(), compute, (told if told is not None else []).append)


def test_a_tail_that_comes_back_is_found_by_one_probe(placed) -> None:
    async def run():
        async with placed() as (model, server, _):
            keeper = keeper_of(model)
            server.fault = "UNAVAILABLE"
            for _ in range(3):
                await model.infer(("y",), inputs(), None, compute)
            assert model.breaker.state == OPEN
            asked = len(server.seen)
            await keeper.look(time.monotonic() + 1000)
            assert (model.breaker.state, len(server.seen)) == (OPEN, asked + 1)
            server.fault = None
            for _ in range(3):
                await keeper.look(0.0)  # it is open again, for a time that is not over
            assert (model.breaker.state, len(server.seen)) == (OPEN, asked + 1)
            await keeper.look(time.monotonic() + 1000)
            assert (model.breaker.state, len(server.seen)) == (CLOSED, asked + 2)
            assert (await model.infer(("y",), inputs(), None, compute)).parameters == {"placement": "split:Relu_h"}

    asyncio.run(run())


def test_auto_follows_the_link_with_hysteresis(placed, monkeypatch) -> None:
    async def run():
        async with placed(WHOLE, BIG, use="auto") as (model, _, _):
            keeper = keeper_of(model)
            monkeypatch.setitem(model.parts, "head-3", dataclasses.replace(model.parts["head-3"], run_s=0.1))
            keeper._planned = planned_model(model)
            keeper._replanner._model = keeper._planned
            link = {"mbps": 1.0}
            monkeypatch.setattr(
                type(model.meter), "link",
                property(lambda _: LinkSpeed(up_mbps=link["mbps"], down_mbps=link["mbps"], rtt_ms=1)),
            )  # fmt: skip
            now_s = 0.0
            placements = []
            for mbps, looks in ((1.0, 3), (1000.0, 2), (1.0, 1), (1000.0, 3), (1.0, 4)):
                link["mbps"] = mbps
                for _ in range(looks):
                    now_s += 20.0
                    await keeper.look(now_s)
                placements.append(model.current.name)
            # A megabyte is 8 s at 1 Mbit/s and 8 ms at 1 Gbit/s; the device takes 100 ms.
            assert placements == ["device", "device", "device", "cloud", "device"]

    asyncio.run(run())


def test_a_link_that_no_request_uses_is_measured_now_and_then(placed) -> None:
    async def run():
        async with placed(WHOLE, IN_CLOUD, use="auto") as (model, server, _):
            keeper = keeper_of(model)
            for now_s in (0.0, 1.0, 2.0, MEASURE_S + 1):
                await keeper.look(now_s)
            assert len(server.seen) == 2
            assert model.meter.link is not None

    asyncio.run(run())


def test_facts_are_told_when_they_change(placed, monkeypatch) -> None:
    monkeypatch.setattr("edge_agent.placement.keeper.LOOK_S", 0.01)
    monkeypatch.setattr("edge_agent.placement.keeper.TELL_S", 0.02)

    async def run():
        async with placed() as (model, server, _):
            told = []
            task = asyncio.create_task(keeper_of(model, told).run())
            await asyncio.sleep(0.1)
            assert len(told) == 1
            await model.infer(("y",), inputs(), None, compute)
            server.fault = "UNAVAILABLE"
            await model.infer(("y",), inputs(), None, compute)
            async with asyncio.timeout(60):
                while not told[-1]["fallback"]:  # noqa: ASYNC110 - a test looks from outside
                    await asyncio.sleep(0.01)
            assert (told[-1]["remote"], told[-1]["placement"], told[-1]["form"]) == (1, "split:Relu_h", "fp32")
            assert told[-1]["reasons"] == {"UNAVAILABLE": 1}
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())


def test_numbers_alone_are_told_now_and_then_and_a_state_at_once(placed) -> None:
    async def run():
        async with placed() as (model, _, _):
            told = []
            keeper = keeper_of(model, told)
            for now_s, remote in ((100.0, 0), (101.0, 1), (109.0, 2), (111.0, 3), (112.0, 3), (130.0, 3)):
                model.counts.remote = remote
                keeper._tell_changes(now_s)
            assert [one["remote"] for one in told] == [0, 3]
            model.breaker.failed(0.0, "lost", at_once=True)
            keeper._tell_changes(130.1)
            assert told[-1]["breaker"] == OPEN

    asyncio.run(run())


def test_a_plan_has_the_device_s_own_times_and_the_publisher_s_for_the_cloud(placed) -> None:
    async def run():
        async with placed(IN_CLOUD, SPLIT, WHOLE, use="auto") as (model, _, _):
            model.parts["head-2"] = dataclasses.replace(model.parts["head-2"], run_s=0.004)
            model.parts["head-3"] = dataclasses.replace(model.parts["head-3"], run_s=0.006)
            planned = planned_model(model)
            found = {one.option.name: one for one in planned.predictions(LinkSpeed(up_mbps=1, down_mbps=1, rtt_ms=2))}
            assert found["cloud"].device_ms == 0
            assert found["cloud"].cloud_ms == pytest.approx(1.0)
            assert found["split:Relu_h"].device_ms == pytest.approx(4.0)
            assert found["split:Relu_h"].cloud_ms == pytest.approx(0.5)
            assert found["device"].device_ms == pytest.approx(6.0)
            assert found["device"].latency_ms == pytest.approx(6.0)
            assert planned.encoding_factor == pytest.approx((4 / 0.5 + 6 / 1.0) / 2)

    asyncio.run(run())
