"""`edgefl simulate` in a separate process: user code cannot end the process that holds the results.

The process sends its state after each round. If it ends too early, another process continues from there.
If a client's own code ended it, the client is tried once more and then counts as failed. If a stack of clients
ended it, they are trained one by one (under `auto`). If no client is to blame, the second time ends the simulation,
with all rounds so far.
Invariant: a simulation that lost a process gives the same result as an undisturbed one, without those clients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path
from types import FrameType
from typing import Any, Self

from edgefl import errors
from edgefl.measure import how_ended, own_peak_mb
from edgefl.records import RoundReport
from edgefl.rounds import without_devices
from edgefl.simulation.isolation.at_work import AtWork, Cell
from edgefl.simulation.isolation.messages import Chose, End, Message, Order, Refused, RoundDone, SimulationInterrupted
from edgefl.simulation.simulate import Watching
from edgefl.simulation.study.checkpoint import FILE, Checkpoint
from edgefl.simulation.study.report import CutShort, ProcessLost, SimulationResult, model_of

MAX_DEATHS = 2  # by the same client, or for the same other reason
MAX_DEATHS_A_ROUND = 64
END_S = 10.0
_FAULT = 1  # exit status of a Python process after an exception
_TOLD_BY = signal.SIGUSR1
_GONE = (EOFError, OSError)  # OSError: also if it ended in the middle of a message
_MAIN = "import sys; sys.path[:] = {path!r}; from edgefl.simulation.isolation.main import main; main({numbers})"


class OwnProcess:
    """Runs simulations, one after another, in a process that is started at once and restarted if it is lost."""

    def __init__(self, *, to_stderr: bool = False) -> None:
        self._to_stderr = to_stderr  # where user code prints, if stdout is for JSON only
        self._child: _Child | None = _Child(to_stderr=to_stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()

    def simulate(self, order: Order, watching: Watching, out: Path | None = None) -> SimulationResult:
        """Return and raise the same as `edgefl.simulate`; also raises ProcessLost."""
        story = _Story(order, watching)
        while True:
            if self._child is None:
                self._child = _Child(to_stderr=self._to_stderr)
            child = self._child
            with child.told_of_interrupts():
                child.send(story.order)
                end = child.receive(story)
            if end is not None:
                return story.ended(end, out)
            self._child = None
            child.close()
            if child.interrupts:
                raise KeyboardInterrupt
            story.lost(child.at_work(), child.status, out)


class _Child:
    """One process, and the pipe to it."""

    def __init__(self, *, to_stderr: bool) -> None:
        self.interrupts, self._busy = 0, False
        self._cell = Cell()
        self._pipe, theirs = Pipe()
        life, self._life = os.pipe()  # our end is closed when this process ends, for any reason
        numbers = (theirs.fileno(), life, self._cell.descriptor)
        code = _MAIN.format(path=[str(one) for one in sys.path], numbers=", ".join(map(str, numbers)))
        with theirs, _blocked({signal.SIGINT, _TOLD_BY}):
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code], pass_fds=numbers, stdout=sys.__stderr__ if to_stderr else None
            )
        os.close(life)

    @property
    def status(self) -> int:
        """Return its exit status, after `close`."""
        return self._process.wait(END_S)

    def at_work(self) -> AtWork:
        """Return what it was doing when it ended."""
        return self._cell.read()

    def send(self, order: Order) -> None:
        self._busy = True
        with contextlib.suppress(*_GONE):  # its end is noticed when an answer is awaited
            self._pipe.send(order)

    def receive(self, story: _Story) -> End | None:
        """Pass all messages to a story; return the last one, or None if the process is gone."""
        while True:
            try:
                message: Message = self._pipe.recv()
            except _GONE:
                self._process.wait(END_S)  # let it end by itself
                return None
            if isinstance(message, End):
                self._busy = False
                return message
            story.handle(message)

    @contextmanager
    def told_of_interrupts(self) -> Iterator[None]:
        """Pass each Ctrl-C on; the third one ends the process. Only the main thread gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def tell(_number: int, _frame: FrameType | None) -> None:
            self.interrupts += 1
            self._process.send_signal(_TOLD_BY if self.interrupts < 3 else signal.SIGKILL)

        before = signal.signal(signal.SIGINT, tell)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def close(self) -> None:
        """End the process: gracefully if it waits for an order, at once if it is working."""
        self._pipe.close()
        if self._busy:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        os.close(self._life)  # this ends it, if it is still running
        self._process.wait(END_S)
        self._cell.close()


class _Story:
    """What is known of a simulation, from all its processes."""

    def __init__(self, order: Order, watching: Watching) -> None:
        self.order = order
        self._watching = watching
        self._rounds: list[RoundReport] = []
        self._state: Checkpoint | None = None
        self._engine, self._reason, self._notes = order.engine, "", list[str]()
        self._deaths: Counter[str] = Counter()
        self._in_a_row = 0

    def handle(self, message: Chose | RoundDone) -> None:
        """Process a message."""
        if isinstance(message, Chose):
            self._engine = message.name
            if not (self._reason and self._notes):  # what another process continues, was chosen before
                self._reason = message.reason
            self._watching.on_engine(message.name, self._why())
            return
        self._in_a_row = 0
        if message.state is not None and message.state.rounds:  # the first message has the rounds of a checkpoint
            self._rounds = list(message.state.rounds)
        else:
            self._rounds.append(message.outcome)
        if message.state is not None:
            before = self._state.parameters if self._state is not None else {}
            parameters = {**before, **message.state.parameters}
            self._state = dataclasses.replace(message.state, rounds=tuple(self._rounds), parameters=parameters)
        self._watching.on_round(message.outcome)

    def ended(self, end: End, out: Path | None) -> SimulationResult:
        """Return the result, and write the model to `out` if given; raises the simulation's error."""
        if isinstance(end, Refused):
            raise _error(end)
        if isinstance(end, SimulationInterrupted):
            raise KeyboardInterrupt
        result = dataclasses.replace(
            end.result,
            engine_reason="; ".join([end.result.engine_reason, *self._notes]),
            peak_rss_mb=end.result.peak_rss_mb + own_peak_mb(),
            model=model_of(end.result.parameters, out) if out is not None and end.result.rounds else end.result.model,
        )
        if end.cut_short:
            raise CutShort(end.cut_short, result)
        return result

    def lost(self, at_work: AtWork, status: int, out: Path | None) -> None:
        """Decide how to continue after a lost process; raises ProcessLost if that makes no sense."""
        how = how_ended(status)
        self._in_a_row += 1
        self._notes = [
            f"its process {how} after round {len(self._rounds)}, and another one continued",
            *self._of_clients(),
        ]
        key = f"client {at_work.client}" if at_work.of_a_client else at_work.doing
        self._deaths[key] += 1
        again = self._deaths[key] < MAX_DEATHS
        failed = dict(self.order.failed)
        engine = self.order.engine
        if self._in_a_row >= MAX_DEATHS_A_ROUND:
            raise self._given_up(f"{self._in_a_row} processes in a row {how}, the last in {at_work.doing}", out)
        if at_work.of_a_client and not again:
            failed[at_work.client] = (
                f"task {self._task()!r}: {at_work.doing} ended its process, which {how}, {MAX_DEATHS} times"
            )
            self._notes.append(f"without {at_work.client}, whose {at_work.doing} ended its process")
        elif at_work.of_a_stack and engine == "auto":
            engine = "loop"
            self._notes.append(f"not in stacks: one's process {how}")
        elif not at_work.of_a_client and (not again or (not at_work.doing and status == _FAULT)):
            raise self._given_up(self._blame(at_work, how), out)
        going_on = self._state
        if going_on is not None:
            going_on = dataclasses.replace(going_on, engine=engine if engine != "auto" else going_on.engine)
        self.order = dataclasses.replace(
            self.order, engine=engine, failed=failed, going_on=going_on, resume=self._resume()
        )

    def _of_clients(self) -> list[str]:
        """Return the notes about clients and stacks; of lost processes only the last one is reported."""
        return [note for note in self._notes if not note.startswith("its process ")]

    def _blame(self, at_work: AtWork, how: str) -> str:
        if at_work.of_a_stack:
            return f"a stack of clients ended its process, which {how}; --engine loop trains them one by one"
        if at_work.doing:
            return f"{at_work.doing} ended its process, which {how}, {MAX_DEATHS} times"
        return f"the simulation's process {how}"

    def _given_up(self, what: str, out: Path | None) -> ProcessLost:
        reason = f"task {self._task()!r}: {what}"
        return ProcessLost(reason, self._so_far(out))

    def _so_far(self, out: Path | None) -> SimulationResult | None:
        state = self._state
        if state is None:
            return None
        return SimulationResult(
            task=state.task,
            engine=self._engine,
            engine_reason=self._why(),
            rounds=state.rounds,
            final=without_devices(state.rounds[-1].metrics),
            seconds=state.seconds,
            round_seconds=sum(one.seconds for one in state.rounds),
            peak_rss_mb=own_peak_mb(),
            parameters=state.parameters,
            model=model_of(state.parameters, out),
            virtual_seconds=state.virtual_s,
            interrupted=True,
            took_part=state.took_part,
        )

    def _resume(self) -> Path | None:
        """Return the folder with this simulation's checkpoint, if it exists by now."""
        folder = self.order.checkpoint
        return folder if folder is not None and (folder / FILE).exists() else self.order.resume

    def _why(self) -> str:
        return "; ".join([self._reason, *self._notes])

    def _task(self) -> str:
        return self._state.task if self._state is not None else self.order.task


@contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[None]:
    """Block these signals, also in a process started inside, which unblocks them when its handlers are set."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _error(refused: Refused) -> errors.EdgeflError:
    kind: Any = getattr(errors, refused.kind, errors.EdgeflError)
    error: errors.EdgeflError = kind.__new__(kind)
    error.args = (refused.message,)
    return error
