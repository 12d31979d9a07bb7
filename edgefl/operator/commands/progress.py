"""A job's rounds on the screen: a bar on a terminal, a line a round elsewhere; and a Ctrl-C that says what goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from edgefl.errors import CloudUnreachable
from edgefl.operator.client import Json
from edgefl.terminal.output import Output, metrics_text
from edgefl.terminal.text import one_line

INTERRUPTED = 130  # as shells count a process that SIGINT ended


@contextmanager
def round_progress(output: Output, count: int | None) -> Iterator[Callable[[Json], None]]:
    """Give what is to hear of each round; a count of None: nobody knows how many there will be."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield lambda outcome: output.line(round_text(outcome, count))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True, markup=False, highlight=False)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text, console=console) as progress:
        bar = progress.add_task("waiting for devices", total=count)

        def show(outcome: Json) -> None:
            console.print(round_text(outcome, count))
            progress.update(bar, completed=outcome["round"], description="rounds")

        yield show


@contextmanager
def left_running(job: str, output: Output) -> Iterator[None]:
    """Turn Ctrl-C into the news that the job goes on without us, and exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        output.line(f"\nno longer watching; job {job} goes on. Watch it again: edgefl jobs watch {job}")
        output.line(f"End it: edgefl jobs cancel {job}")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except CloudUnreachable:
        output.line(f"job {job} goes on in the cloud. Watch it again: edgefl jobs watch {job}")
        raise


def round_text(outcome: Json, count: int | None) -> str:
    """Return one line on a finished round, with the reason of each refusal."""
    counts = [f"{outcome['admitted']} admitted"]
    counts += [f"{outcome[name]} {name}" for name in ("rejected", "failed", "missing") if outcome[name]]
    of = "" if count is None else f"/{count}"
    text = f"round {outcome['round']}{of}: {', '.join(counts)} in {outcome['seconds']:.2f} s "
    text += metrics_text(outcome["metrics"])
    reasons = "; ".join(f"{device}: {reason}" for device, reason in outcome["reasons"].items())
    return one_line(f"{text.rstrip()} ({reasons})" if reasons else text.rstrip())
