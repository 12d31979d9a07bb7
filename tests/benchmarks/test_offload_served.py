"""A placed model above its floor, on real processes; what the device of the benchmark does."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

from benchmarks import offload_device, offload_served


def test_a_placed_model_is_compared_with_its_floor() -> None:
    row = offload_served._above_floor(20)
    assert row.detail["whole_ms"] > 0
    assert row.ours == row.detail["whole_ms"] - row.detail["floor_ms"]
    assert [str(one) for one in row.targets] == ["ours <= 1"]


def test_a_slow_device_computes_one_part_after_the_other() -> None:
    running, most = 0, 0

    def run(_names, _feeds):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.002)
        running -= 1
        return []

    async def both():
        device = offload_device.SlowDevice()
        model = SimpleNamespace(run=run)
        await asyncio.gather(*(device.compute(model, (), {}) for _ in range(3)))

    asyncio.run(both())
    assert most == 1
