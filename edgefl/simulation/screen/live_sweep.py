"""A sweep on the screen: a row a variant on a terminal, a line a round elsewhere; a comparison at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgefl.simulation.screen.live import Progress, line_text, size_text
from edgefl.simulation.study.report import Json
from edgefl.simulation.study.sweep import SweepResult, SweepWatching, VariantResult
from edgefl.simulation.study.variants import Variant
from edgefl.terminal.output import Output
from edgefl.terminal.text import one_line

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"running": "bold", "done": "green", "failed": "red", "interrupted": "yellow"}
_MAX_ERROR = 400  # letters of a reason on the screen; the JSON has all of them
_NOTHING = ("-", "-", "-", "-", "-", "")


class SweepProgress:
    """What is known of each variant. `counts`: how many rounds each will have, None where nobody knows."""

    def __init__(self, variants: Sequence[Variant], counts: Sequence[int | None]) -> None:
        self._progress = {one.name: Progress(count) for one, count in zip(variants, counts, strict=True)}
        self._cells: dict[str, tuple[str, ...]] = dict.fromkeys(self._progress, _NOTHING)
        self._states = dict.fromkeys(self._progress, "waiting")

    def begin(self, variant: str, *, now_s: float) -> None:
        """Note that a variant begins."""
        self._states[variant] = "running"
        self._progress[variant].begin("", now_s=now_s)

    def note(self, variant: str, outcome: Json, *, now_s: float) -> tuple[str, ...]:
        """Note a round; returns its cells."""
        self._cells[variant] = self._progress[variant].note(outcome, now_s=now_s)
        return self._cells[variant]

    def end(self, ended: VariantResult) -> None:
        """Note how a variant ended."""
        self._states[ended.variant.name] = state_of(ended)

    def table(self) -> Table:
        """Return a row a variant."""
        from rich.table import Table
        from rich.text import Text

        table = Table("variant", "", "round", "clients/s", "left", "metrics", box=None, header_style="bold")
        for name, state in self._states.items():
            number, _, rate, _, left, metrics = self._cells[name]
            left = left if state == "running" else ""
            style = _STYLES.get(state, "dim")
            table.add_row(Text(one_line(name)), Text(state, style), number, rate, left, Text(one_line(metrics)))
        return table


@contextmanager
def live_sweep(output: Output, progress: SweepProgress) -> Iterator[SweepWatching]:
    """Give what is to hear of a sweep."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield SweepWatching(
            on_begin=lambda variant: progress.begin(variant.name, now_s=time.perf_counter()),
            on_engine=lambda variant, name, reason: output.line(f"{variant.name}: engine {name}: {reason}"),
            on_round=lambda variant, outcome: output.line(
                f"{variant.name}: {line_text(outcome, progress.note(variant.name, outcome, now_s=time.perf_counter()))}"
            ),
        )
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False, highlight=False)
    with Live(progress.table(), console=console, auto_refresh=False, transient=True) as live:

        def begin(variant: Variant) -> None:
            progress.begin(variant.name, now_s=time.perf_counter())
            live.update(progress.table(), refresh=True)

        def show(variant: Variant, outcome: Json) -> None:
            progress.note(variant.name, outcome, now_s=time.perf_counter())
            live.update(progress.table(), refresh=True)

        def end(ended: VariantResult) -> None:
            progress.end(ended)
            live.update(progress.table(), refresh=True)

        yield SweepWatching(on_begin=begin, on_round=show, on_end=end)


def compare(result: SweepResult, output: Output) -> None:
    """Print one row a variant, and why those failed that did."""
    said = [one.as_json() for one in result.variants]
    metrics = sorted({name for one in said for name in _last_metrics(one)})
    virtual = any(one.get("virtual_seconds") is not None for one in said)
    columns = ["variant", "", "rounds", *metrics, "clients/s", "moved", "seconds", *(["virtual seconds"] * virtual)]
    rows = []
    for one, ended in zip(said, result.variants, strict=True):
        values = [f"{_last_metrics(one)[name]:.4g}" if name in _last_metrics(one) else None for name in metrics]
        moved = size_text(sum(outcome["up_bytes"] + outcome["down_bytes"] for outcome in ended.rounds))
        times = [_number(one, "seconds", ".1f"), *([_number(one, "virtual_seconds", ".0f")] * virtual)]
        rate = _number(one, "clients_per_second", ".0f")
        rows.append([one["name"], state_of(ended), len(ended.rounds), *values, rate, moved, *times])
    output.table(columns, rows, "no variant was run", _STYLES)
    for ended in result.failed:
        error = str(ended.error)
        output.line(f"{ended.variant.name}: {error if len(error) <= _MAX_ERROR else error[:_MAX_ERROR] + ' ...'}")


def state_of(ended: VariantResult) -> str:
    """Return `done`, `failed` or `interrupted`."""
    if ended.result is None:
        return "failed"
    return "interrupted" if ended.result.interrupted else "done"


def _last_metrics(said: Json) -> Json:
    """Return the final metrics; of a variant that failed, those of the last round it finished."""
    final: Json | None = said.get("final")
    return final if final is not None else said["rounds"][-1]["metrics"] if said["rounds"] else {}


def _number(said: Json, key: str, form: str) -> str | None:
    return format(said[key], form) if said.get(key) is not None else None
