"""Statistics in the form of Triton's extension."""

from __future__ import annotations

import asyncio

from edge_agent.placement.stats import stats_of
from tests.edge_agent.placement.conftest import compute, inputs


def test_what_became_of_requests(placed) -> None:
    async def run():
        async with placed() as (model, server, _):
            await model.infer(("y",), inputs(), None, compute)
            server.fault = "INTERNAL"
            await model.infer(("y",), inputs(), None, compute)
            (one,) = stats_of(model)["model_stats"]
            assert (one["name"], one["version"], one["inference_count"]) == ("m", "1", 2)
            assert one["inference_stats"] == {"success": {"count": 2}, "fail": {"count": 0}}
            assert (one["placement"]["remote"], one["placement"]["fallback"]) == (1, 1)
            assert one["placement"]["reasons"] == {"INTERNAL": 1}

    asyncio.run(run())
