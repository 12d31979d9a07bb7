"""Which devices a job may use now, and why not the others: presence, their own policy, `rounds.select`, other jobs.

It waits until enough devices are there, as long as the settings allow; then, in its turn, until they are free.
Invariant: of each device that has reported a state, it is known whether it was chosen, and if not, why.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cloud.jobs.device_shares import DeviceShares, Wait
from edgefl.choosing.expression import Expression, parse
from edgefl.choosing.facts import REPORTED, TAG, Facts, Value
from edgefl.choosing.history import History
from edgefl.config import RoundsConfig
from edgefl.exchange import cohort_size, gathering
from edgefl.protocols.messages import DeviceState, Telemetry

OFFLINE, POLICY, SELECT, BUSY, UTILITY, TIER = "offline", "policy", "select", "busy", "utility", "tier"
LOOK_S = 5.0  # between two looks at telemetry, which changes without notice

_TELEMETRY: Mapping[str, str] = {  # field of an expression -> of telemetry, where the names differ
    "mem_mb": "ram_available_mb",
    "mem_total_mb": "ram_total_mb",
    "disk_mb": "disk_free_mb",
    "load": "load_1m",
}


class LinkView(Protocol):
    """What the choice needs of the devices' link."""

    def states(self) -> Mapping[str, DeviceState]:
        """Return the last state of each device."""

    def telemetry(self, device: str) -> Telemetry | None:
        """Return the latest telemetry of an online device."""

    def wait_until(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until the predicate is true, at each change of presence; False at the timeout."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a device is not in a cohort."""

    code: str  # offline | policy | select | busy | utility | tier
    text: str


@dataclass(slots=True)
class ChoiceBoard:
    """The latest choice of each running job, for the operator's plane."""

    reasons: dict[str, Mapping[str, Reason]] = field(default_factory=dict)  # job -> device -> why not
    waits: dict[str, str] = field(default_factory=dict)  # job -> what it waits for

    def forget(self, job: str) -> None:
        self.reasons.pop(job, None)
        self.waits.pop(job, None)


class DeviceChoice:
    """The choice of one job. Used in its thread."""

    def __init__(
        self, job: str, rounds: RoundsConfig, link: LinkView, shares: DeviceShares, board: ChoiceBoard,
        history: History | None = None,
    ) -> None:  # fmt: skip
        self._job, self._rounds, self._link, self._shares, self._board = job, rounds, link, shares, board
        self.unreachable: Callable[[str], str] = lambda _device: ""  # why this job cannot use a device; empty = it can
        self._history = history if history is not None else History()
        self._expression: Expression | None = parse(rounds.select) if rounds.select else None
        self._reads_telemetry = self._expression is not None and bool({*self._expression.fields} & REPORTED.keys())
        self._eligible: list[str] = []  # online, willing and selected; also those that are busy
        self._granted: list[str] = []
        self._reasons: dict[str, Reason] = {}
        self.next_round = 1
        if not rounds.shared_devices:
            shares.enter(job, priority=rounds.priority, weight=rounds.weight)

    def wait(self, is_stopped: Callable[[], bool], *, is_first: bool) -> list[str]:
        """Wait for devices, then for the job's turn; return the devices that a cohort can be drawn from.

        There may be fewer than the quorum, if no more came in time. Empty if the job was stopped.
        """
        while not is_stopped():
            if self._look() < self._rounds.quorum and not self._rounds.shared_devices:
                self._shares.rest(self._job)
            for num_devices, wait_s in gathering(self._rounds, is_first=is_first):
                if self._wait(lambda num=num_devices: is_stopped() or self._look() >= num, wait_s):  # type: ignore[misc]
                    break
            if self._rounds.shared_devices or len(self._eligible) < self._rounds.quorum:
                self._note({})
                return self._eligible
            if self._wait(functools.partial(self._has_turn, is_stopped), None) and self._granted:
                return self._granted
            is_first = False  # devices have gone while it waited for its turn
        return []

    def chosen(self, cohort: Iterable[str]) -> None:
        """Take in which of the devices are in the cohort; the others are free again."""
        cohort = frozenset(cohort)
        text = "others were drawn" if self._rounds.utility == "random" else "others are of more use: rounds.utility"
        left = {device: Reason(UTILITY, text) for device in self._eligible if device not in cohort}
        self._note({device: self._reasons.get(device, reason) for device, reason in left.items()})
        self._board.waits.pop(self._job, None)
        if not self._rounds.shared_devices:
            self._shares.keep(self._job, cohort)

    def not_chosen(self) -> dict[str, tuple[str, str]]:
        """Return of devices outside the latest cohort why (code, reason)."""
        return {name: (one.code, one.text) for name, one in self._board.reasons.get(self._job, {}).items()}

    def freed(self, devices: Iterable[str] | None = None) -> None:
        """Take in that devices have answered; None = the round is over."""
        if not self._rounds.shared_devices:
            self._shares.release(self._job, None if devices is None else frozenset(devices))

    def end(self) -> None:
        """Leave all devices to other jobs."""
        self._shares.leave(self._job)
        self._board.forget(self._job)

    def _wait(self, predicate: Callable[[], bool], limit_s: float | None) -> bool:
        """Wait until the predicate is true, without limit or so long; telemetry is looked at again at times."""
        left_s = math.inf if limit_s is None else limit_s
        while True:
            step_s = min(left_s, LOOK_S) if limit_s is None or self._reads_telemetry else left_s
            left_s -= step_s
            if self._link.wait_until(predicate, step_s):
                return True
            if left_s <= 0:
                return False

    def _look(self) -> int:
        """Judge every device that has reported a state; return how many may work for the job, now or later."""
        self._reasons = {}
        self._eligible = sorted(name for name, state in self._link.states().items() if self._may_work(name, state))
        return len(self._eligible)

    def _may_work(self, name: str, state: DeviceState) -> bool:
        if not state.online:
            return False  # the operator's plane knows
        if why := self.unreachable(name):
            self._reasons[name] = Reason(TIER, why)
        elif state.refuses:
            text = ", ".join(f"{code} ({why})" for code, why in state.refuses.items())
            self._reasons[name] = Reason(POLICY, f"its own policy: {text}")
        elif self._expression is not None and (why := self._expression.why_not(self._facts(name, state))):
            self._reasons[name] = Reason(SELECT, why)
        return name not in self._reasons

    def _has_turn(self, is_stopped: Callable[[], bool]) -> bool:
        """Whether the wait for the turn is over: it has come, or devices have gone, or the job was stopped."""
        self._granted = []
        if is_stopped() or self._look() < self._rounds.quorum:
            return True
        count = min(cohort_size(self._rounds) or len(self._eligible), len(self._eligible))
        answer = self._shares.ask(self._job, self._eligible, count)
        if isinstance(answer, Wait):
            self._board.waits[self._job] = answer.text()
        busy = {
            name: holder for name in self._eligible if (holder := self._shares.holder(name)) not in {None, self._job}
        }
        self._reasons |= {name: Reason(BUSY, f"it works for {holder}") for name, holder in busy.items()}
        if isinstance(answer, Wait):
            self._note({})
            return False
        self._granted = answer
        return True

    def _note(self, others: Mapping[str, Reason]) -> None:
        self._board.reasons[self._job] = {**self._reasons, **others}

    def _facts(self, name: str, state: DeviceState) -> Facts:
        learnt = self._history.facts(name, self.next_round)

        def facts(field_name: str) -> Value | None:
            if field_name.startswith(TAG):
                return state.tags.get(field_name[len(TAG) :], "")
            if field_name in REPORTED:
                telemetry = self._link.telemetry(name)
                value = None if telemetry is None else getattr(telemetry, _TELEMETRY.get(field_name, field_name))
                return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            return name if field_name == "name" else learnt[field_name]

        return facts
