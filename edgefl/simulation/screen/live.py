"""Simulations and sweeps on the screen: a live table on a terminal, one line per round elsewhere.

A simulation's table has one row per round, a sweep's one per variant; a sweep ends with a comparison.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgefl.records import RoundReport
from edgefl.simulation.study.report import Json
from edgefl.simulation.study.sweep import SweepResult, SweepWatching, VariantResult, last_metrics
from edgefl.simulation.study.variants import Variant
from edgefl.terminal.once import Once
from edgefl.terminal.output import Output, metric_texts, metrics_text
from edgefl.terminal.text import grouped, one_line

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 12  # of the table: the latest rounds
REASONS = 3  # per line
_UNITS = ("B", "kB", "MB", "GB", "TB")
_STYLES = {"running": "bold", "done": "green", "failed": "red", "interrupted": "yellow"}
_MAX_ERROR = 400  # characters of a reason on the screen; the JSON has the full text
_NOTHING = ("-", "-", "-", "-", "-", "")


@dataclass(frozen=True, slots=True)
class RoundCallbacks:
    """Callbacks that update the screen."""

    on_engine: Callable[[str, str], None]  # its name, and why it was chosen
    on_round: Callable[[RoundReport], None]


class Progress:
    """The progress after each round."""

    def __init__(self, count: int | None) -> None:  # None: unknown number of rounds
        self._count, self._engine = count, "being chosen"
        self._reason = self.lost = ""
        self._once = Once()
        self.news = ""  # of the latest round: which clients did not evaluate, and why, if that was not said before
        self._ends_s: deque[float] = deque(maxlen=ROWS)  # end times of the latest rounds, and the start
        self._rows: deque[tuple[str, ...]] = deque(maxlen=ROWS)

    def begin(self, engine: str, reason: str = "", *, now_s: float) -> None:
        """Record which engine begins, or goes on; the first call also begins the first round."""
        self._engine, self._reason = engine, reason
        if not self._ends_s:
            self._ends_s.append(now_s)

    def note(self, outcome: RoundReport, *, now_s: float) -> tuple[str, ...]:
        """Return a round's cells: round, clients, clients/s, bytes, time left, metrics."""
        done = outcome.round
        self._ends_s.append(now_s)
        a_round_s = (now_s - self._ends_s[0]) / max(1, len(self._ends_s) - 1)
        rate = outcome.admitted / outcome.seconds if outcome.seconds > 0 else 0.0
        cells = (
            f"{done}/{self._count}" if self._count is not None else str(done),
            outcome.counts_text(),
            f"{rate:.0f}",
            size_text(outcome.up_bytes + outcome.down_bytes),
            duration_text(a_round_s * (self._count - done)) if self._count is not None else "?",
            metrics_text(outcome.metrics),
        )
        self._rows.append(cells)
        not_evaluated = self._once.text(outcome.not_evaluated, REASONS)
        self.news = f"not evaluated: {not_evaluated}" if not_evaluated else ""
        if reasons := "; ".join(filter(None, (reasons_text(outcome), self.news))):
            self.lost = f"round {done}: {reasons}"
        return cells

    def engine_text(self) -> str:
        """Return `engine loop: it was asked for`."""
        return f"engine {self._engine}: {self._reason}".rstrip(": ")

    def table(self) -> Table:
        """Return the latest rounds as a table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            "round", "clients", "clients/s", "moved", "left", "metrics", box=None, header_style="bold", pad_edge=False,
            title=Text(one_line(self.engine_text())), title_justify="left",
            caption=Text(one_line(self.lost)) if self.lost else None, caption_justify="left",
        )  # fmt: skip
        for row in self._rows:
            table.add_row(*(Text(one_line(cell)) for cell in row))
        return table


class SweepProgress:
    """The progress of each variant. `counts`: the number of rounds of each, None if unknown."""

    def __init__(self, variants: Sequence[Variant], counts: Sequence[int | None]) -> None:
        self._progress = {one.name: Progress(count) for one, count in zip(variants, counts, strict=True)}
        self._cells: dict[str, tuple[str, ...]] = dict.fromkeys(self._progress, _NOTHING)
        self._states = dict.fromkeys(self._progress, "waiting")
        self._lost = ""  # the latest clients that failed or did not evaluate, and why

    def begin(self, variant: str, *, now_s: float) -> None:
        """Record that a variant begins."""
        self._states[variant] = "running"
        self._progress[variant].begin("", now_s=now_s)

    def note(self, variant: str, outcome: RoundReport, *, now_s: float) -> tuple[str, ...]:
        """Record a round; returns its cells."""
        self._cells[variant] = self._progress[variant].note(outcome, now_s=now_s)
        if lost := self._progress[variant].lost:
            self._lost = f"{variant}, {lost}"
        return self._cells[variant]

    def news(self, variant: str) -> str:
        """Return which clients did not evaluate in a variant's latest round, and why, if that was not said before."""
        return self._progress[variant].news

    def end(self, ended: VariantResult) -> None:
        """Record how a variant ended."""
        self._states[ended.variant.name] = state_of(ended)

    def table(self) -> Table:
        """Return a table with one row per variant."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            "variant", "", "round", "clients/s", "left", "metrics", box=None, header_style="bold",
            caption=Text(one_line(self._lost)) if self._lost else None, caption_justify="left",
        )  # fmt: skip
        for name, state in self._states.items():
            number, _, rate, _, left, metrics = self._cells[name]
            left = left if state == "running" else ""
            style = _STYLES.get(state, "dim")
            table.add_row(Text(one_line(name)), Text(state, style), number, rate, left, Text(one_line(metrics)))
        return table


@contextmanager
def live_rounds(output: Output, progress: Progress) -> Iterator[RoundCallbacks]:
    """Yield the callbacks that show the engine and each round."""
    with _drawn(progress.table) as draw:

        def on_engine(engine: str, reason: str) -> None:
            progress.begin(engine, reason, now_s=time.perf_counter())
            draw() if draw is not None else output.line(progress.engine_text())

        def on_round(outcome: RoundReport) -> None:
            cells = progress.note(outcome, now_s=time.perf_counter())
            if draw is not None:
                draw()
                return
            output.line(line_text(outcome, cells))
            if progress.news:
                output.line(progress.news)

        yield RoundCallbacks(on_engine, on_round)


@contextmanager
def live_sweep(output: Output, progress: SweepProgress) -> Iterator[SweepWatching]:
    """Yield the callbacks that show a sweep."""
    with _drawn(progress.table, transient=True) as draw:

        def on_begin(variant: Variant) -> None:
            progress.begin(variant.name, now_s=time.perf_counter())
            if draw is not None:
                draw()

        def on_engine(variant: Variant, name: str, reason: str) -> None:
            if draw is None:
                output.line(f"{variant.name}: engine {name}: {reason}")

        def on_round(variant: Variant, outcome: RoundReport) -> None:
            cells = progress.note(variant.name, outcome, now_s=time.perf_counter())
            if draw is not None:
                draw()
                return
            output.line(f"{variant.name}: {line_text(outcome, cells)}")
            if news := progress.news(variant.name):
                output.line(f"{variant.name}: {news}")

        def on_end(ended: VariantResult) -> None:
            progress.end(ended)
            if draw is not None:
                draw()

        yield SweepWatching(on_begin=on_begin, on_engine=on_engine, on_round=on_round, on_end=on_end)


@contextmanager
def _drawn(table: Callable[[], Table], *, transient: bool = False) -> Iterator[Callable[[], None] | None]:
    """Yield a function that redraws the table, or None if there is no terminal."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False, highlight=False)
    with Live(table(), console=console, auto_refresh=False, transient=transient) as live:
        yield lambda: live.update(table(), refresh=True)


def compare(result: SweepResult, output: Output) -> None:
    """Print one row per variant, and the errors of failed variants."""
    said = [one.as_json() for one in result.variants]
    shown = [metric_texts(last_metrics(one)) for one in said]
    metrics = sorted({name for one in shown for name in one})
    virtual = any(one.get("virtual_seconds") is not None for one in said)
    columns = ["variant", "", "rounds", *metrics, "clients/s", "moved", "seconds", *(["virtual seconds"] * virtual)]
    rows, best = [], result.best
    for one, ended, last in zip(said, result.variants, shown, strict=True):
        marks = {name: " *" if best.get(name) == one["name"] else "" for name in metrics}
        values = [f"{last[name]}{marks[name]}" if name in last else None for name in metrics]
        moved = size_text(sum(outcome.up_bytes + outcome.down_bytes for outcome in ended.rounds))
        times = [_number(one, "seconds", ".1f"), *([_number(one, "virtual_seconds", ".0f")] * virtual)]
        rate = _number(one, "clients_per_second", ".0f")
        rows.append([one["name"], state_of(ended), len(ended.rounds), *values, rate, moved, *times])
    output.table(
        columns, rows, "no variant was run", _STYLES, whole=("variant",),
        spare=("moved", "clients/s", "virtual seconds", "seconds", "rounds"),
    )  # fmt: skip
    if best:
        output.line("* the best value of a metric")
    for ended in result.variants:
        if fault := ended.last_evaluation.fault:
            output.line(f"{ended.variant.name}: {one_line(fault)}")
    for ended in result.failed:
        error = str(ended.error)
        output.line(f"{ended.variant.name}: {error if len(error) <= _MAX_ERROR else error[:_MAX_ERROR] + ' ...'}")


def state_of(ended: VariantResult) -> str:
    """Return `done`, `failed` or `interrupted`."""
    if ended.result is None:
        return "failed"
    return "interrupted" if ended.result.interrupted else "done"


def _number(said: Json, key: str, form: str) -> str | None:
    return format(said[key], form) if said.get(key) is not None else None


def line_text(outcome: RoundReport, cells: tuple[str, ...]) -> str:
    """Return a round as one line, with the reasons of failed and refused clients."""
    number, clients, rate, moved, left, metrics = cells
    text = f"round {number}: {clients}, {rate} clients/s, {moved} moved, {left} left {metrics}".rstrip()
    reasons = reasons_text(outcome)
    return f"{text} ({reasons})" if reasons else text


def reasons_text(outcome: RoundReport) -> str:
    """Return the first few reasons of failed and refused clients, each once."""
    return one_line(grouped(outcome.reasons, REASONS))


def size_text(num_bytes: float) -> str:
    """Return bytes as `12.3 MB`."""
    step = min(len(_UNITS) - 1, int(math.log10(num_bytes) // 3)) if num_bytes >= 1 else 0
    return f"{num_bytes / 1000**step:.3g} {_UNITS[step]}"


def duration_text(seconds: float) -> str:
    """Return a duration as `1:23:45`, or `0:07`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
