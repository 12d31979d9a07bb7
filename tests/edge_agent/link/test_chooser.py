"""Which parent is used: with real servers that answer, refuse, or are gone."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from edge_agent.link.channel import CloudChannel
from edge_agent.link.chooser import ParentChooser, ParentRules
from edge_agent.link.lease import LeasePolicy, ReturnPolicy
from edge_agent.link.parents import KnownParents
from edge_agent.link.profile import load_profile
from edgefl.errors import ParentLeft
from edgefl.protocols.manifest import ParentAddress, Parents, sign
from edgefl.protocols.messages import encode
from edgefl.protocols.ports.client_channel import answered


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


class Device:
    """A chooser with a clock that a test turns; its first parent is gone, its second one answers."""

    def __init__(self, fleet, home, comes_back="idle") -> None:
        self.clock, self.idle = Clock(), True
        dead = ParentAddress(name="cloud", url="https://127.0.0.1:1", grpc="127.0.0.1:1", broker="mqtts://127.0.0.1:1")
        alive = ParentAddress(
            name="cloud", url="https://localhost:2", grpc=f"localhost:{fleet.port}", broker="mqtts://127.0.0.1:1"
        )
        self.signed = sign(Parents(device="cam-1", sequence=1, parents=[dead, alive]), fleet.key)
        known = KnownParents(home, load_profile(home), fleet.key.public_key())
        known.take(self.signed)
        policy = LeasePolicy(lease_s=30, comes_back=ReturnPolicy(comes_back))
        self.chooser = ParentChooser(home, known, ParentRules(policy=policy, is_idle=lambda: self.idle), self.clock)
        self.chooser.current = known.profiles[1]


@pytest.fixture
def home(fleet, tmp_path):
    return fleet.enrol(tmp_path / "agent")


def unreachable():
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone")


def test_a_parent_is_left_when_its_lease_is_over_and_another_answers(fleet, home):
    async def run():
        device = Device(fleet, home, "never")
        device.chooser.reached()
        device.clock.now_s = 31
        assert await device.chooser.choose() is None  # it was not asked: nothing is known against it
        device.chooser.failed(unreachable())
        fleet.stop()
        assert await device.chooser.choose() is None  # no other answers: it stays
        await asyncio.to_thread(fleet.start)
        chosen = await device.chooser.choose()
        assert chosen is not None
        assert chosen.grpc != "127.0.0.1:1"
        assert await device.chooser.choose() is None

    asyncio.run(run())


def test_a_refusal_with_a_list_changes_the_parent_at_once(fleet, home):
    async def run():
        device = Device(fleet, home)
        device.chooser.reached()
        there = ParentAddress(
            name="cloud", url="https://localhost:3", grpc=f"localhost:{fleet.port}", broker="mqtts://127.0.0.1:1"
        )
        signed = sign(Parents(device="cam-1", sequence=2, parents=[there]), fleet.key)
        trailing = grpc.aio.Metadata(("edgefl-parents-bin", encode(signed)))
        device.chooser.failed(
            grpc.aio.AioRpcError(grpc.StatusCode.PERMISSION_DENIED, grpc.aio.Metadata(), trailing, "not here")
        )
        assert (await device.chooser.choose()) is not None

    asyncio.run(run())


@pytest.mark.parametrize(("comes_back", "returns"), [("now", True), ("idle", False), ("never", False)])
def test_a_busy_device_comes_back_as_its_policy_says(fleet, home, comes_back, returns):
    async def run():
        device = Device(fleet, home, comes_back)
        device.chooser.current = device.chooser._known.profiles[-1]
        device.idle, device.clock.now_s = False, 31
        assert (await device.chooser.choose() is not None) is returns
        assert device.chooser.waits_for_idle is (comes_back == "idle")
        device.idle = True
        assert (await device.chooser.choose() is not None) is (comes_back == "idle")

    asyncio.run(run())


def test_a_call_that_is_running_when_the_parent_changes_ends_with_parent_left(fleet, home):
    async def run():
        profile = load_profile(home)
        channel = CloudChannel(profile, home)
        fleet.before_chunk = lambda _way, _offset: __import__("time").sleep(1)
        call = channel.download(fleet.blob(b"x" * 100).sha256, 0)
        reading = asyncio.create_task(answered(call.read()))
        await asyncio.sleep(0.2)
        await channel.switch(profile)
        with pytest.raises(ParentLeft):
            await reading
        assert (await channel.next("1")) is not None
        await channel.close()

    asyncio.run(run())
