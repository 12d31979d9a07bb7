"""A job's rounds on the screen: a progress bar on a terminal, else one line per round; and messages after Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

from edgefl.errors import CloudUnreachable
from edgefl.operator.client import Patience
from edgefl.records import RoundReport
from edgefl.terminal.once import Once
from edgefl.terminal.output import INTERRUPTED, Output, metrics_text
from edgefl.terminal.text import grouped, one_line

WAITING = "waiting for devices"  # until the first round is finished


@dataclass(frozen=True, slots=True)
class Screen:
    """Callbacks that show a job while it is followed."""

    on_round: Callable[[RoundReport], None]
    line: Callable[[str], None]  # prints other lines

    def tell_waiting(self, job: str, waiting: str) -> None:
        """Show what the cloud waits for; if empty, that the wait is over."""
        if waiting:
            self.line(f"job {job} pauses: the cloud is {waiting}. It continues by itself afterwards")
        else:
            self.line(f"job {job} continues: the cloud no longer waits")


def patience(line: Callable[[str], None]) -> Patience:
    """Return the usual patience with a cloud, which says on the screen why a call is tried again."""
    return Patience(on_retry=lambda reason, left_s: line(f"{reason}; trying again for up to {left_s:.0f} s"))


@contextmanager
def round_progress(output: Output, count: int | None) -> Iterator[Screen]:
    """Yield the callbacks that show each round; `count` None: the number of rounds is unknown.

    Without a terminal: one line per round, and one for each other state that a terminal would show.
    """
    once = Once()

    def lines(outcome: RoundReport) -> list[str]:
        not_evaluated = once.text(outcome.not_evaluated)
        return [round_text(outcome, count), *([f"not evaluated: {not_evaluated}"] if not_evaluated else [])]

    def print_lines(outcome: RoundReport) -> None:
        for line in lines(outcome):
            output.line(line)

    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        output.line(WAITING)
        yield Screen(print_lines, output.line)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True, markup=False, highlight=False)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text, console=console) as progress:
        bar = progress.add_task(WAITING, total=count)

        def show(outcome: RoundReport) -> None:
            for line in lines(outcome):
                console.print(line)
            progress.update(bar, completed=outcome.round, description="rounds")

        yield Screen(show, lambda said: console.print(one_line(said)))


@dataclass(slots=True)
class Standing:
    """What the cloud knows of a job that is being submitted or followed, for the message after Ctrl-C."""

    job: str = ""  # its id, once it is known
    is_asked_for: bool = False  # the cloud was asked to start it

    def ask(self) -> None:
        """Record that the cloud is now asked to start the job."""
        self.is_asked_for = True

    def after_interrupt(self) -> str:
        """Return whether the job continues, and how to follow or end it."""
        if self.job:
            goes_on = f"job {self.job} continues in the cloud, unless it has ended"
            return f"no longer watching; {goes_on}. {_remedies(self.job)}"
        if self.is_asked_for:
            return f"interrupted while submitting the job, which may run in the cloud. {_LOOK}"
        return "interrupted before the job was submitted; nothing runs in the cloud"


_LOOK = "Check with: edgefl jobs list; end it with: edgefl jobs cancel JOB"


@contextmanager
def left_running(output: Output, job: str = "") -> Iterator[Standing]:
    """On Ctrl-C, say whether the job continues in the cloud, and exit with status 130."""
    standing = Standing(job)
    try:
        yield standing
    except KeyboardInterrupt:
        output.line(f"\n{standing.after_interrupt()}")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except CloudUnreachable:
        if standing.job:
            output.line(f"job {standing.job} continues in the cloud. {_remedies(standing.job)}")
        elif standing.is_asked_for:
            output.line(f"the cloud did not answer the request to start the job, which may run there. {_LOOK}")
        raise


def _remedies(job: str) -> str:
    return f"Watch it with: edgefl jobs watch {job}; end it with: edgefl jobs cancel {job}"


def round_text(outcome: RoundReport, count: int | None) -> str:
    """Return one line about a finished round, with the reason of each refusal."""
    of = "" if count is None else f"/{count}"
    text = f"round {outcome.round}{of}: {outcome.counts_text()} in {outcome.seconds:.2f} s "
    text += metrics_text(outcome.metrics)
    reasons = grouped(outcome.reasons)
    return one_line(f"{text.rstrip()} ({reasons})" if reasons else text.rstrip())
