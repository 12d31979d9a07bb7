"""Decides which of its parents a device uses: probes them, and follows the lease (`edge_agent.link.lease`).

A probe is one `Next` over a connection of its own, so the parent in use is not left before another one has answered.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from edge_agent.link.channel import PARENTS_METADATA, CloudChannel
from edge_agent.link.lease import Lease, LeasePolicy
from edge_agent.link.parents import KnownParents, parent_name
from edge_agent.link.profile import Profile
from edgefl.errors import ManifestRejected, ProtocolError
from edgefl.logs import event
from edgefl.process.version import __version__
from edgefl.protocols.messages import Signed, decode

PROBE_S = 5.0  # for a connection and an answer

_log = logging.getLogger(__name__)


def _always() -> bool:
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class ParentRules:
    """When a device changes its parent, and whether it is idle now."""

    policy: LeasePolicy = field(default_factory=LeasePolicy)
    is_idle: Callable[[], bool] = _always


class ParentChooser:
    """The choice among the parents of one device. Used in the agent's event loop."""

    def __init__(
        self, home: Path, known: KnownParents, rules: ParentRules, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._home, self._known, self._rules, self._clock = home, known, rules, clock
        self._lease = Lease(rules.policy, clock())
        self._waits_for_idle = False
        self.current = known.profiles[0]
        self.since_s = time.time()  # since when the present parent is in use

    @property
    def names(self) -> list[str]:
        """The names of the parents, in their order."""
        return list(dict.fromkeys(parent_name(one) for one in self._known.profiles))

    @property
    def waits_for_idle(self) -> bool:
        """Whether the device goes back to an earlier parent as soon as it is idle."""
        return self._waits_for_idle

    @property
    def look_s(self) -> float:
        """How often the present parent must be asked, so that its lease is kept; infinite for an only one."""
        return self._rules.policy.lease_s if len(self._known.profiles) > 1 else math.inf

    def take(self, signed: bytes) -> None:
        """Take a list of parents, if it is new and signed by the fleet's key; otherwise the log says why not."""
        try:
            self._known.take(decode(Signed, signed))
        except (ManifestRejected, ProtocolError) as error:
            event(_log, logging.WARNING, "parents.refused", reason=error)
        except OSError as error:  # full disk: the next answer brings it again
            event(_log, logging.ERROR, "parents.not_kept", reason=error)

    def reached(self) -> None:
        """The present parent has answered."""
        self._lease.reached(self._clock())

    def failed(self, error: grpc.aio.AioRpcError) -> None:
        """The present parent did not answer, or refused this device, perhaps with a list of others."""
        said: Any = error.trailing_metadata() or ()  # pairs, whatever the types of gRPC say
        others = dict(said).get(PARENTS_METADATA)
        if isinstance(others, bytes):
            self.take(others)
        self._lease.failed(refused=error.code() is grpc.StatusCode.PERMISSION_DENIED and others is not None)

    async def choose(self) -> Profile | None:
        """Return the parent to change to; None = the present one stays."""
        profiles, now_s, is_idle = self._known.profiles, self._clock(), self._rules.is_idle()
        is_listed = self.current in profiles
        if self._lease.is_over(now_s) or (is_idle and not is_listed):
            chosen = await self._first_that_answers([one for one in profiles if one != self.current])
            why = "the parent in use does not answer" if is_listed else "the parent in use is not in the list any more"
            return None if chosen is None else self._changed_to(chosen, why)
        position = profiles.index(self.current) if is_listed else 0
        if self._lease.wants_probe(position, now_s) or (self._waits_for_idle and is_idle):
            earlier = await self._first_that_answers(profiles[:position])
            self._lease.probed(self._clock())
            self._waits_for_idle = earlier is not None and not self._lease.may_return(is_idle=self._rules.is_idle())
            if earlier is not None and not self._waits_for_idle:
                return self._changed_to(earlier, "an earlier parent answers again")
        return None

    def _changed_to(self, profile: Profile, reason: str) -> Profile:
        event(_log, logging.INFO, "parent.changed", before=parent_name(self.current), parent=parent_name(profile),
              grpc=profile.grpc, reason=reason)  # fmt: skip
        self.current, self.since_s, self._waits_for_idle = profile, time.time(), False
        self._lease.begin(self._clock())
        return profile

    async def _first_that_answers(self, profiles: Sequence[Profile]) -> Profile | None:
        for profile in profiles:
            channel = CloudChannel(profile, self._home)
            try:
                async with asyncio.timeout(PROBE_S):
                    await channel.next(__version__)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                event(_log, logging.DEBUG, "parent.silent", parent=parent_name(profile), reason=_reason(error))
            else:
                return profile
            finally:
                await channel.close()
        return None


def _reason(error: grpc.aio.AioRpcError | TimeoutError) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"no answer within {PROBE_S:g} s"
