"""Wishes that come while an agent begins to serve what it holds."""

from __future__ import annotations

import asyncio

from edgefl.errors import ProtocolError
from tests.edge_agent.updater_device import Device


def test_a_wish_that_cuts_off_a_restart_and_fails_leaves_the_old_release_serving(fleet, home, until, onnx_model):
    async def run():
        device = Device(home, until)
        running = asyncio.create_task(device.updater.run())
        await device.install(fleet.release(onnx_model(1.0), 1, sequence=1))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await device.channel.close()
        await restarted()

    async def restarted():
        device = Device(home, until)
        loading, go = asyncio.Event(), asyncio.Event()

        async def load(model):
            if model.version == 2:
                raise ProtocolError("version 2 is broken")
            loading.set()
            await go.wait()

        device.host.before_load = load
        running = [asyncio.create_task(device.updater.restore()), asyncio.create_task(device.updater.run())]
        await loading.wait()
        await device.install(fleet.release(onnx_model(2.0), 2, sequence=2))
        go.set()
        await device.until(lambda: device.models.versions() == {"digits": 1})
        assert (2, "failed") in device.states()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await device.channel.close()

    asyncio.run(run())
