"""A simulation's own process: all user code of `edgefl simulate` runs in it, or in its children.

After each round it sends the command all that is needed to continue; if it dies, only the unfinished
round is lost. It ends with the command that started it, which also tells it of Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from importlib.util import find_spec
from multiprocessing.connection import Connection

from edgefl.errors import EdgeflError
from edgefl.measure import seldom_collected
from edgefl.records import RoundReport
from edgefl.simulation.isolation.at_work import Cell, watch
from edgefl.simulation.isolation.messages import (
    Chose,
    End,
    OnlyNew,
    Order,
    Refused,
    RoundDone,
    SimulationFinished,
    SimulationInterrupted,
)
from edgefl.simulation.simulate import Watching, simulate
from edgefl.simulation.study.checkpoint import Checkpoint
from edgefl.simulation.study.report import CutShort
from edgefl.terminal import debug
from edgefl.terminal.interrupt import told_by

TOLD_BY = signal.SIGUSR1  # the command's signal for Ctrl-C


def main(pipe: int, life: int, cell: int) -> None:
    """Run the ordered simulations, one after another, until the command is gone."""
    sys.excepthook = debug.tell_unexpected
    told_by(TOLD_BY)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, TOLD_BY})
    except KeyboardInterrupt:  # before there was any result
        os._exit(128 + signal.SIGINT)
    threading.Thread(target=_end_with, args=(life,), name="parent", daemon=True).start()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # lines in their place between the command's
    served, note = Connection(pipe), Cell(cell)
    with seldom_collected():
        if find_spec("torch") is not None:
            import torch  # noqa: F401 - while the command reads its configuration
        while True:
            try:
                order: Order = served.recv()
            except (EOFError, KeyboardInterrupt):
                return
            watch(note, order.failed)
            end = _served(order, served)
            sys.stdout.flush()
            note.clear()
            served.send(end)


def _served(order: Order, pipe: Connection) -> End:
    states: list[Checkpoint] = []
    only_new = OnlyNew()

    def on_state(state: Checkpoint) -> None:
        rounds = state.rounds if only_new.first else ()
        states.append(dataclasses.replace(state, rounds=tuple(rounds), parameters=only_new.of(state.parameters)))

    def on_round(outcome: RoundReport) -> None:
        pipe.send(RoundDone(outcome, states.pop() if states else None))

    watching = Watching(on_engine=lambda *said: pipe.send(Chose(*said)), on_round=on_round, on_state=on_state)
    try:
        result = simulate(
            order.task, engine=order.engine, config=order.config, data=order.data, evaluate_every=order.evaluate_every,
            checkpoint=order.checkpoint, checkpoint_every=order.checkpoint_every, resume=order.resume,
            address=order.address, watching=watching, going_on=order.going_on,
        )  # fmt: skip
    except CutShort as error:
        return SimulationFinished(error.so_far, str(error))
    except EdgeflError as error:
        return Refused(type(error).__name__, str(error))
    except KeyboardInterrupt:
        return SimulationInterrupted()
    return SimulationFinished(result)


def _end_with(life: int) -> None:
    """End this process when the command ends for any reason: then the command's end of this pipe is closed."""
    os.read(life, 1)
    os._exit(1)
