"""One seed for all that the user's code may draw from: the global states of Python, numpy and torch.

Whoever trains a client, in whatever order and process, its code draws the same numbers; and whoever called
us finds its own states as they were.
Invariant: user code runs inside `seeded`; nothing of ours draws from a global state.
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
    """Whether somebody further out puts the states back, so that `seeded` need not: it costs ten times a seed."""

    depth = 0


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global state inside, and leave it as it was."""
    if _Keeper.depth:
        _seed(seed)
        yield
        return
    with kept():
        _seed(seed)
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Put the global states back in the end; `seeded` inside does not do it again each time."""
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
    """Python's and numpy's global states at one moment: to see whether something drew from them, and to put them back.

    torch's own draws are followed by those who record steps.
    """

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), _numpy_state()

    def since(self) -> bool:
        """Say whether anything was drawn, or seeded, since."""
        if random.getstate() != self._python:
            return True
        return any(not np.array_equal(one, other) for one, other in zip(_numpy_state(), self._numpy, strict=True))

    def put_back(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002 - as below


def _numpy_state() -> tuple[Any, ...]:
    return tuple(np.random.get_state())  # noqa: NPY002 - users draw from it, whatever we do


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & _MASK)  # noqa: NPY002 - as above
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "manual_seed"):  # absent, or on its way in
        return
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed notes the whole stack for GPUs that may come
