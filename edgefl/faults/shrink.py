"""Shrinks the faults of a failing seed: leaves out what is not needed for the failure.

Delta debugging (Zeller and Hildebrandt 2002, "Simplifying and Isolating Failure-Inducing Input", section 3).
Invariant: what is returned still fails, and without any one of its faults it does not, unless the tries ran out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

MAX_TRIES = 200

_T = TypeVar("_T")


def shrunk(items: Sequence[_T], fails: Callable[[Sequence[_T]], bool], max_tries: int = MAX_TRIES) -> list[_T]:
    """Return a part of the items that still fails; `fails` is called at most `max_tries` times."""
    left, tries = list(items), max_tries
    if tries and left:
        tries -= 1
        if fails([]):
            return []
    parts = 2
    while len(left) >= 2 and tries > 0:
        size = -(-len(left) // parts)
        for start in range(0, len(left), size):
            rest = left[:start] + left[start + size :]
            if tries == 0:
                return left
            tries -= 1
            if fails(rest):
                left, parts = rest, max(parts - 1, 2)
                break
        else:
            if parts >= len(left):
                break
            parts = min(len(left), 2 * parts)
    return left
