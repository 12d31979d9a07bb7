"""Graceful Ctrl-C: the first press ends the round, the second ends at once.

The terminal sends SIGINT to all its processes. A child that another process watches ignores it, and gets another
signal from that process instead.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _InterruptSignal:
    number = signal.SIGINT


def told_by(number: signal.Signals) -> None:
    """From now on treat this signal as Ctrl-C, and ignore the terminal's SIGINT."""
    _InterruptSignal.number = number
    signal.signal(signal.SIGINT, lambda _number, _frame: None)  # not SIG_IGN, which commands would inherit
    signal.signal(number, signal.default_int_handler)


@contextmanager
def set_by_interrupt(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set the event. Only the main thread gets signals; in other threads nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    number = _InterruptSignal.number

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(number, before)
        stop.set()

    before = signal.signal(number, on_interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, so that what is inside cleans up after itself."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
