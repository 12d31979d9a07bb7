"""A device with an updater that runs, and releases for it."""

from __future__ import annotations

import asyncio

import pytest

from tests.edge_agent.updater_device import Device


@pytest.fixture
def on_device(home, until):
    def run(function):
        async def inside():
            device = Device(home, until)
            await device.updater.restore()
            running = asyncio.create_task(device.updater.run())
            try:
                return await function(device)
            finally:
                running.cancel()
                [ended] = await asyncio.gather(running, return_exceptions=True)
                await device.channel.close()
                assert isinstance(ended, asyncio.CancelledError), ended

        return asyncio.run(inside())

    return run


@pytest.fixture
def versions(fleet, onnx_model):
    """`versions(n, **options)`: a signed wish for version n, whose model answers 1 with n + 1."""

    def make(version: int, **options):
        return fleet.release(onnx_model(float(version)), version, **{"sequence": version, **options})

    return make
