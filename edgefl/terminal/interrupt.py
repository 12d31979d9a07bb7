"""Ctrl-C as a wish: the first ends the round with what was admitted, the second ends at once.

A process that is watched hears of it by another signal, from the one that watches: a terminal tells both.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Heard:
    number = signal.SIGINT


def told_by(number: signal.Signals) -> None:
    """Hear of a Ctrl-C by this signal from now on, and of the terminal's no more."""
    _Heard.number = number
    signal.signal(signal.SIGINT, lambda _number, _frame: None)  # not SIG_IGN, which commands would inherit
    signal.signal(number, signal.default_int_handler)


@contextmanager
def set_by_interrupt(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set the event. Only the main thread hears signals; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    heard = _Heard.number

    def wish(_number: int, _frame: FrameType | None) -> None:
        signal.signal(heard, before)
        stop.set()

    before = signal.signal(heard, wish)
    try:
        yield
    finally:
        signal.signal(heard, before)
