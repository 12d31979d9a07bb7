"""Random states of their own for code that shares a process with other code.

A Flower app's ClientApps may run in the process of its ServerApp. In Flower they never do, so an app may count on
this: what its clients draw or seed changes nothing of what its server draws (the noise of differential privacy, the
choice of clients).
Invariant: outside of `used` the global states of Python, numpy and torch (on the CPU) are as if the code inside had
never run; inside, they continue where the code inside left them.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

_Digests = Mapping[str, bytes]


def state_digests() -> _Digests:
    """Return a digest of Python's and numpy's global state, to see later which of them some code has changed."""
    sources = _sources()
    return {name: hashlib.sha256(pickle.dumps(sources[name][0]())).digest() for name in _FRESH}


class OwnRandomness:
    """Global random states that belong to the code inside `used`. Not thread-safe, as the global states are not.

    They begin as in a process that imports the same code: with torch's state as it is, and with Python's and numpy's
    as they are if the import seeded them, that is, changed them since `before`. Otherwise a new process would have
    other ones, and two equal streams of noise could be subtracted from each other: these two are then seeded from
    a hash of the current state.
    """

    def __init__(self, before: _Digests | None = None) -> None:
        now = state_digests()
        known = now if before is None else before
        self._states = {name: get() for name, (get, _) in _sources().items()}
        for name, fresh in _FRESH.items():
            if known[name] == now[name]:
                self._states[name] = fresh(now[name])

    @contextmanager
    def used(self) -> Iterator[None]:
        """A context whose draws come from these states, and change no others."""
        sources = _sources()
        outside = {name: get() for name, (get, _) in sources.items()}
        for name, state in self._states.items():
            sources[name][1](state)
        try:
            yield
        finally:
            self._states = {name: get() for name, (get, _) in sources.items()}
            for name, state in outside.items():
                sources[name][1](state)


def _sources() -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return how to read and how to set each global state."""
    found: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "python": (random.getstate, random.setstate),
        "numpy": (np.random.get_state, np.random.set_state),
    }
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_rng_state"):  # installed, and no longer being imported
        found["torch"] = (torch.get_rng_state, torch.set_rng_state)
    return found


_FRESH: Mapping[str, Callable[[bytes], Any]] = {
    "python": lambda seed: random.Random(seed).getstate(),  # noqa: S311 - not for secrets
    "numpy": lambda seed: np.random.RandomState(np.frombuffer(seed, np.uint32)).get_state(),
}
