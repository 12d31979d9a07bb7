"""The watch reports changes of what a policy refuses."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.policy.rules import MachineState, parse_policy
from edge_agent.policy.watch import PolicyWatch, refusal_text


class Measured:
    """A machine whose use of processors a test sets."""

    busy_percent = 80.0

    def measure(self):
        return MachineState(busy_percent=self.busy_percent, on_mains=True, metered=False, minute=0, unknown={})


def test_it_refuses_from_the_first_moment_and_reports_changes(monkeypatch):
    monkeypatch.setattr("edge_agent.policy.watch.CHECK_S", 0.01)
    machine, heard, news = Measured(), [], asyncio.Event()

    def hear(refusals):
        heard.append(refusals)
        news.set()

    watch = PolicyWatch(parse_policy("idle"), machine, hear)
    assert watch.refusals.keys() == {"not-idle"}
    assert refusal_text(watch.refusals) == "not-idle (other programs use 80% of the processors)"

    async def run():
        running = asyncio.create_task(watch.run())
        machine.busy_percent = 90.0  # another figure, but no news
        await asyncio.sleep(0.1)
        assert heard == []
        machine.busy_percent = 3.0
        await asyncio.wait_for(news.wait(), 10)
        running.cancel()

    asyncio.run(run())
    assert heard == [{}]
    assert watch.text == "idle"


def test_without_a_policy_nothing_is_refused_or_measured():
    watch = PolicyWatch(None, Measured(), pytest.fail)

    async def run():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch.run(), 0.05)

    asyncio.run(run())
    assert (watch.refusals, watch.text) == ({}, "")
