"""Watches a device's policy: measures the machine at intervals, and reports each change of what it refuses.

Nothing in a system notifies of processor use or of a cable's cost, so both are measured every CHECK_S.
Invariant: the first measurement is made before there is anything to refuse.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from edge_agent.policy.machine import Machine
from edge_agent.policy.rules import DevicePolicy
from edgefl.logs import event

FIRST_S, CHECK_S = 0.3, 10.0

_log = logging.getLogger(__name__)


class PolicyWatch:
    """What a device refuses now. Used in the agent's event loop."""

    def __init__(
        self, policy: DevicePolicy | None, machine: Machine, on_change: Callable[[Mapping[str, str]], None]
    ) -> None:
        self._policy, self._machine, self._on_change = policy, machine, on_change
        self.refusals: Mapping[str, str] = {}
        if policy is not None:
            time.sleep(FIRST_S)  # of processor use; once, before the agent begins
            self.refusals = policy.refusals(machine.measure())

    @property
    def text(self) -> str:
        """The policy as it was given; empty without one."""
        return "" if self._policy is None else self._policy.text

    async def run(self) -> None:
        """Measure until cancelled; without a policy, only wait for that."""
        if self._policy is None:
            await asyncio.get_running_loop().create_future()
            return
        while True:
            await asyncio.sleep(CHECK_S)
            self.judge(self._policy.refusals(await asyncio.to_thread(self._machine.measure)))

    def judge(self, refusals: Mapping[str, str]) -> None:
        """Take in what the policy refuses now; only other codes are news, not other figures."""
        is_news = refusals.keys() != self.refusals.keys()
        self.refusals = dict(refusals)
        if is_news:
            event(_log, logging.INFO, "policy.changed", refuses=", ".join(refusals) or "-")
            self._on_change(self.refusals)


def refusal_text(refusals: Mapping[str, str]) -> str:
    """Return refusals as one text: codes with what was measured."""
    return ", ".join(f"{code} ({why})" for code, why in refusals.items())
