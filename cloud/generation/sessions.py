"""The sequences that devices have at a tail: who may have how many, with how much memory, and for how long.

A sequence belongs to its device: another device's id is an unknown one. Its memory is reserved when it starts, for
the most tokens that it will have, so that no sequence fails in its middle because others began. It has a lease, which
each request renews. Pure: the clock is an argument.
Invariant: the reserved bytes are the sum over the sequences that are here, and never more than the limits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from cloud.stages.work import RequestRefused

ORPHAN_S = 10.0  # the lease of a device's sequences when it has no stream any more


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionLimits:
    """What devices may have."""

    context: int  # tokens of a sequence
    token_bytes: int  # of keys and values of one token
    of_device: int = 8  # sequences
    total: int = 256
    cache_bytes: int = 1 << 30  # reserved by all
    lease_s: float = 60.0

    @property
    def device_cache_bytes(self) -> int:
        """What one device may reserve: half, so that one alone never shuts out the others."""
        return max(self.cache_bytes // 2, min(self.cache_bytes, self.context * self.token_bytes))


@dataclass(eq=False, slots=True)
class TailSequence:
    """A sequence. `length` counts the tokens in its cache."""

    device: str
    sequence: str
    key: int  # by which the process knows it
    max_tokens: int
    num_bytes: int
    due_s: float
    length: int = 0
    is_busy: bool = False  # a request of it is waiting or computed
    last: tuple[int, int, int] | None = None  # position and rows of the last request, and its token


class TailSequences:
    """All sequences of one tail."""

    def __init__(self, limits: SessionLimits) -> None:
        self.limits = limits
        self._found: dict[tuple[str, str], TailSequence] = {}
        self._keys = itertools.count(1)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def reserved_bytes(self) -> int:
        return sum(one.num_bytes for one in self._found.values())

    def start(self, device: str, sequence: str, max_tokens: int, now_s: float) -> TailSequence:
        """Begin a sequence, in place of one of that name; raises RequestRefused if it does not fit the limits."""
        limits = self.limits
        if max_tokens > limits.context:
            raise RequestRefused(
                "INVALID_ARGUMENT",
                f"the sequence may get {max_tokens} tokens; the context has {limits.context}",
            )
        former = self._found.get((device, sequence))
        others = [one for one in self._found.values() if one is not former]
        own = [one for one in others if one.device == device]
        needed = max_tokens * limits.token_bytes
        if len(own) >= limits.of_device:
            raise RequestRefused(
                "RESOURCE_EXHAUSTED",
                f"device {device} has {len(own)} sequences here, the most that it may have; end one, or wait until "
                f"its lease of {limits.lease_s:g} s is over",
            )
        reserved = sum(one.num_bytes for one in own)
        if reserved + needed > limits.device_cache_bytes:
            raise RequestRefused("RESOURCE_EXHAUSTED", _no_room(f"device {device}", reserved, needed,
                                                                limits.device_cache_bytes))  # fmt: skip
        total = sum(one.num_bytes for one in others)
        if len(others) >= limits.total or total + needed > limits.cache_bytes:
            words = _no_room("all devices", total, needed, limits.cache_bytes)
            if len(others) >= limits.total:
                words = f"there are {len(others)} sequences here, the most of all devices; try again later"
            raise RequestRefused("RESOURCE_EXHAUSTED", words)
        session = TailSequence(device, sequence, next(self._keys), max_tokens, needed, now_s + limits.lease_s)
        self._found[device, sequence] = session
        return session

    def find(self, device: str, sequence: str, now_s: float) -> TailSequence:
        """Return a sequence, and renew its lease; raises RequestRefused (ABORTED) if it is not here."""
        session = self._found.get((device, sequence))
        if session is None or session.due_s < now_s:
            raise RequestRefused(
                "ABORTED",
                f"sequence {sequence[:80]!r} of device {device} is not here: its lease of {self.limits.lease_s:g} s is "
                "over, or the tail was started again. Begin it again with all its rows",
            )
        session.due_s = now_s + self.limits.lease_s
        return session

    def get(self, device: str, sequence: str) -> TailSequence | None:
        """Return a sequence, if it is here."""
        return self._found.get((device, sequence))

    def end(self, session: TailSequence) -> None:
        """Forget a sequence, if it is here."""
        if self._found.get((session.device, session.sequence)) is session:
            del self._found[session.device, session.sequence]

    def orphan(self, device: str, now_s: float) -> None:
        """Shorten the leases of a device that is gone."""
        for one in self._found.values():
            if one.device == device:
                one.due_s = min(one.due_s, now_s + ORPHAN_S)

    def take_expired(self, now_s: float) -> list[TailSequence]:
        """Forget and return the sequences whose leases are over; one that is computed is kept."""
        over = [one for one in self._found.values() if one.due_s < now_s and not one.is_busy]
        for one in over:
            self.end(one)
        return over

    def clear(self) -> None:
        """Forget all: their caches are lost."""
        self._found.clear()


def _no_room(whose: str, reserved: int, needed: int, limit: int) -> str:
    return (
        f"there is no room for the keys and values of this sequence: it needs {needed >> 10} KiB, {whose} may have "
        f"{limit >> 10} KiB, of which {reserved >> 10} KiB are taken. Ask for fewer tokens (max_tokens), or try again "
        "later"
    )
