"""A circuit breaker: a tail that fails is left alone for a while, then tried by one probe at a time.

    closed     requests go to the tail; so many failures in a row open it
    open       no request goes there; when its time is over, a probe is due
    half-open  the probe is on its way; its success closes the breaker, its failure opens it for twice as long

The times are jittered (half to one and a half of the delay), so that the devices of a fleet do not return at once.
No request of a client is a probe, so that none pays for it. No clock and no I/O: the caller says what time it is.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerRules:
    """How patient a breaker is."""

    failures: int = 3  # in a row
    first_s: float = 1.0  # open for about so long
    most_s: float = 30.0


class CircuitBreaker:
    """The breaker of one tail. Used in one thread."""

    def __init__(self, rules: BreakerRules, draws: random.Random) -> None:
        self._rules, self._draws = rules, draws
        self.state = CLOSED
        self.reason = ""  # of the last failure
        self._failures, self._delay_s, self._until_s = 0, rules.first_s, 0.0

    @property
    def allows(self) -> bool:
        """Whether a request may go to the tail."""
        return self.state == CLOSED

    def succeeded(self) -> None:
        """Note an answer: of a request, or of the probe."""
        self.state, self.reason = CLOSED, ""
        self._failures, self._delay_s = 0, self._rules.first_s

    def failed(self, now_s: float, reason: str, *, at_once: bool = False) -> None:
        """Note a failure; `at_once` opens the breaker without waiting for more, since the next would fail, too."""
        self.reason = reason
        self._failures += 1
        if self.state == OPEN:
            return  # of a request that was on its way
        if self.state == HALF_OPEN:
            self._delay_s = min(2 * self._delay_s, self._rules.most_s)
        elif self._failures < self._rules.failures and not at_once:
            return
        self.state = OPEN
        self._until_s = now_s + self._delay_s * self._draws.uniform(0.5, 1.5)

    def takes_probe(self, now_s: float) -> bool:
        """Whether a probe is due; then it is on its way, and no second one is due before its end."""
        if self.state != OPEN or now_s < self._until_s:
            return False
        self.state = HALF_OPEN
        return True
