"""A simulation on the screen: a table that grows on a terminal, a line a round elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgefl.simulation.study.report import Json
from edgefl.terminal.output import Output, metrics_text
from edgefl.terminal.text import one_line

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 12  # of the table: the last rounds
REASONS = 3  # on a line
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Screen:
    """What the screen is to hear of."""

    on_engine: Callable[[str, str], None]  # its name, and why it was chosen
    on_round: Callable[[Json], None]


class Progress:
    """What is known after each round."""

    def __init__(self, count: int | None) -> None:  # None: nobody knows how many there will be
        self._count, self._engine = count, "being chosen"
        self._reason = self._lost = ""
        self._ends_s: deque[float] = deque(maxlen=ROWS)  # of the last rounds, and of what came before the first
        self._rows: deque[tuple[str, ...]] = deque(maxlen=ROWS)

    def begin(self, engine: str, reason: str = "", *, now_s: float) -> None:
        """Note that the first round begins."""
        self._engine, self._reason = engine, reason
        self._ends_s.append(now_s)

    def note(self, outcome: Json, *, now_s: float) -> tuple[str, ...]:
        """Return a round's cells: round, clients, clients/s, bytes, time left, metrics."""
        done = outcome["round"]
        self._ends_s.append(now_s)
        a_round_s = (now_s - self._ends_s[0]) / max(1, len(self._ends_s) - 1)
        rate = outcome["admitted"] / outcome["seconds"] if outcome["seconds"] > 0 else 0.0
        cells = (
            f"{done}/{self._count}" if self._count is not None else str(done),
            _clients(outcome),
            f"{rate:.0f}",
            size_text(outcome["up_bytes"] + outcome["down_bytes"]),
            duration_text(a_round_s * (self._count - done)) if self._count is not None else "?",
            metrics_text(outcome["metrics"]),
        )
        self._rows.append(cells)
        if reasons := reasons_text(outcome):
            self._lost = f"round {done}: {reasons}"
        return cells

    def engine_text(self) -> str:
        """Return `engine loop: it was asked for`."""
        return f"engine {self._engine}: {self._reason}".rstrip(": ")

    def table(self) -> Table:
        """Return the last rounds as a table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            "round", "clients", "clients/s", "moved", "left", "metrics", box=None, header_style="bold", pad_edge=False,
            title=Text(one_line(self.engine_text())), title_justify="left",
            caption=Text(one_line(self._lost)) if self._lost else None, caption_justify="left",
        )  # fmt: skip
        for row in self._rows:
            table.add_row(*(Text(one_line(cell)) for cell in row))
        return table


@contextmanager
def live_rounds(output: Output, progress: Progress) -> Iterator[Screen]:
    """Give what is to hear of the engine and of each round."""

    def begin(engine: str, reason: str) -> None:
        progress.begin(engine, reason, now_s=time.perf_counter())

    def note(outcome: Json) -> tuple[str, ...]:
        return progress.note(outcome, now_s=time.perf_counter())

    if not (sys.stdout.isatty() and sys.stderr.isatty()):

        def say_engine(engine: str, reason: str) -> None:
            begin(engine, reason)
            output.line(progress.engine_text())

        yield Screen(say_engine, lambda outcome: output.line(line_text(outcome, note(outcome))))
        return
    from rich.console import Console
    from rich.live import Live

    with Live(progress.table(), console=Console(stderr=True, markup=False), auto_refresh=False) as live:

        def draw_engine(engine: str, reason: str) -> None:
            begin(engine, reason)
            live.update(progress.table(), refresh=True)

        def draw_round(outcome: Json) -> None:
            note(outcome)
            live.update(progress.table(), refresh=True)

        yield Screen(draw_engine, draw_round)


def line_text(outcome: Json, cells: tuple[str, ...]) -> str:
    """Return a round as one line, with the reasons of whoever did not make it."""
    number, clients, rate, moved, left, metrics = cells
    text = f"round {number}: {clients}, {rate} clients/s, {moved} moved, {left} left {metrics}".rstrip()
    reasons = reasons_text(outcome)
    return f"{text} ({reasons})" if reasons else text


def reasons_text(outcome: Json) -> str:
    """Return why the first few of those who did not make it did not."""
    reasons = [one_line(f"{device}: {reason}") for device, reason in list(outcome["reasons"].items())[:REASONS]]
    more = len(outcome["reasons"]) - len(reasons)
    return "; ".join([*reasons, *([f"and {more} more"] if more else [])])


def size_text(num_bytes: float) -> str:
    """Return bytes as `12.3 MB`."""
    step = min(len(_UNITS) - 1, int(math.log10(num_bytes) // 3)) if num_bytes >= 1 else 0
    return f"{num_bytes / 1000**step:.3g} {_UNITS[step]}"


def duration_text(seconds: float) -> str:
    """Return a duration as `1:23:45`, or `0:07`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def _clients(outcome: Json) -> str:
    counts = [f"{outcome['admitted']} admitted"]
    counts += [f"{outcome[name]} {name}" for name in ("rejected", "failed", "missing") if outcome[name]]
    return ", ".join(counts)
