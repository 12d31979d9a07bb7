"""The first Ctrl-C is a wish, the second an order."""

import signal
import threading

import pytest

from edgefl.simulation.interrupt import set_by_interrupt


def test_the_first_sets_the_event_and_the_second_interrupts():
    before, stop = signal.getsignal(signal.SIGINT), threading.Event()
    with set_by_interrupt(stop):
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def elsewhere():
        with set_by_interrupt(threading.Event()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    assert seen == [before]
