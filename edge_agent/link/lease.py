"""Which parent a device should use: a state machine without I/O, told of contacts and failures.

A parent is left when it has not been reached for the time of its lease, or refuses the device: then the others are
probed in their order, and the first that answers is used. While an earlier parent than the present one could be used,
it is probed at intervals, without leaving the present one; whether and when the device comes back is the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from edgefl.errors import ConfigError

FIRST_S = 5.0  # the lease of a parent that was not reached since the start: it may be long gone
MAX_LEASE_S = 86_400.0


class ReturnPolicy(Enum):
    """When a device comes back to an earlier parent in its list that answers again."""

    IDLE = "idle"  # when it has no round to work for, and nothing to send
    NOW = "now"
    NEVER = "never"  # only when the present one is lost


@dataclass(frozen=True, kw_only=True, slots=True)
class LeasePolicy:
    """When a device changes its parent."""

    lease_s: float = 15.0  # without contact; also the interval at which earlier parents are probed
    comes_back: ReturnPolicy = ReturnPolicy.IDLE

    def __post_init__(self) -> None:
        if not 0 < self.lease_s <= MAX_LEASE_S:
            raise ConfigError(f"--parent-lease-s {self.lease_s:g} must be above 0 and at most {MAX_LEASE_S:g}")


class Lease:
    """The lease of the parent in use. Times are seconds of a monotonic clock."""

    def __init__(self, policy: LeasePolicy, now_s: float) -> None:
        self._policy = policy
        self.begin(now_s)

    def begin(self, now_s: float) -> None:
        """Another parent is in use from now on, or the same one after a restart."""
        self._reached_s, self._was_reached = now_s, False
        self._probed_s = now_s
        self._is_lost = self._is_refused = False

    def reached(self, now_s: float) -> None:
        """The parent has answered."""
        self._reached_s, self._was_reached = now_s, True
        self._is_lost = self._is_refused = False

    def failed(self, *, refused: bool = False) -> None:
        """The parent did not answer, or `refused` this device."""
        self._is_lost = True
        self._is_refused = self._is_refused or refused

    def is_over(self, now_s: float) -> bool:
        """Whether another parent should be looked for."""
        lease_s = self._policy.lease_s if self._was_reached else min(FIRST_S, self._policy.lease_s)
        return self._is_refused or (self._is_lost and now_s - self._reached_s >= lease_s)

    def wants_probe(self, position: int, now_s: float) -> bool:
        """Whether earlier parents should be probed now; `position` is that of the present one in the list."""
        wanted = position > 0 and self._policy.comes_back is not ReturnPolicy.NEVER
        return wanted and now_s - self._probed_s >= self._policy.lease_s

    def probed(self, now_s: float) -> None:
        """Earlier parents were probed."""
        self._probed_s = now_s

    def may_return(self, *, is_idle: bool) -> bool:
        """Whether the device goes back to an earlier parent that answered."""
        return is_idle or self._policy.comes_back is ReturnPolicy.NOW
