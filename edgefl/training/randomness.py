"""Seed all global random states that the user's code may use: those of Python, numpy and torch.

A client's code draws the same numbers in any order of clients and in any process; the caller's random states
are restored afterwards.
Invariant: user code runs inside `seeded`; edgefl itself never uses a global state.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

_MASK = 0xFFFFFFFF  # numpy's seeds have 32 bits


class _Keeper:
    """Whether an outer `kept` restores the states, so that `seeded` need not: that costs ten times a seed."""

    depth = 0


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global state inside, and restore it afterwards."""
    if _Keeper.depth:
        seed_all(seed)
        yield
        return
    with kept():
        seed_all(seed)
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Restore the global states at the end; `seeded` inside does not restore them each time."""
    before = Drawn()
    with ExitStack() as stack:
        if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "random"):
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.callback(before.put_back)
        _Keeper.depth += 1
        try:
            yield
        finally:
            _Keeper.depth -= 1


class Drawn:
    """A snapshot of Python's and numpy's global states: to detect draws from them, and to restore them.

    torch's draws are tracked when steps are recorded.
    """

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), _numpy_state()

    def since(self) -> bool:
        """Whether anything was drawn or seeded since."""
        if random.getstate() != self._python:
            return True
        return any(not np.array_equal(one, other) for one, other in zip(_numpy_state(), self._numpy, strict=True))

    def put_back(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002 - as below


def _numpy_state() -> tuple[Any, ...]:
    return tuple(np.random.get_state())  # noqa: NPY002 - users draw from it, whatever we do


def seed_all(seed: int) -> None:
    """Seed every global state, and restore none."""
    random.seed(seed)
    np.random.seed(seed & _MASK)  # noqa: NPY002 - as above
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "manual_seed"):  # not installed, or still being imported
        return
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed stores the stack trace for later GPUs
