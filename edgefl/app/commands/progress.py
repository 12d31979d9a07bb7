"""A job's rounds on the screen: a bar on a terminal, a line a round elsewhere; and a Ctrl-C that says what goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

from edgefl.errors import CloudUnreachable
from edgefl.records import RoundReport
from edgefl.terminal.output import INTERRUPTED, Output, metrics_text
from edgefl.terminal.text import one_line


@dataclass(frozen=True, slots=True)
class Screen:
    """Where a job that is followed is shown."""

    on_round: Callable[[RoundReport], None]
    line: Callable[[str], None]  # beside the rounds

    def tell_waiting(self, job: str, waiting: str) -> None:
        """Say what the cloud waits for; where that is empty, that it is over."""
        if waiting:
            self.line(f"job {job} pauses: the cloud is {waiting}. It goes on by itself when the cloud can")
        else:
            self.line(f"job {job} goes on: the cloud has what it waited for")


@contextmanager
def round_progress(output: Output, count: int | None) -> Iterator[Screen]:
    """Give what is to hear of each round; a count of None: nobody knows how many there will be."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield Screen(lambda outcome: output.line(round_text(outcome, count)), output.line)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True, markup=False, highlight=False)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text, console=console) as progress:
        bar = progress.add_task("waiting for devices", total=count)

        def show(outcome: RoundReport) -> None:
            console.print(round_text(outcome, count))
            progress.update(bar, completed=outcome.round, description="rounds")

        yield Screen(show, lambda said: console.print(one_line(said)))


@dataclass(slots=True)
class Standing:
    """What the cloud has of a job that somebody here wants to see, for who interrupts that."""

    job: str = ""  # its id, once that is known
    is_asked_for: bool = False  # the cloud was asked to start it

    def ask(self) -> None:
        """Note that the cloud is asked to start the job, now."""
        self.is_asked_for = True

    def after_interrupt(self) -> str:
        """Say whether the job goes on, and how to follow or end it."""
        if self.job:
            goes_on = f"job {self.job} goes on in the cloud, unless it has ended"
            return f"no longer watching; {goes_on}. {_remedies(self.job)}"
        if self.is_asked_for:
            return f"interrupted while the cloud was asked to start the job, which may run there. {_LOOK}"
        return "interrupted before the job was submitted; nothing runs in the cloud"


_LOOK = "Look: edgefl jobs list; end it: edgefl jobs cancel JOB"


@contextmanager
def left_running(output: Output, job: str = "") -> Iterator[Standing]:
    """Turn Ctrl-C into the news whether the job goes on without us, and exit status 130."""
    standing = Standing(job)
    try:
        yield standing
    except KeyboardInterrupt:
        output.line(f"\n{standing.after_interrupt()}")
        raise click.exceptions.Exit(INTERRUPTED) from None
    except CloudUnreachable:
        if standing.job:
            output.line(f"job {standing.job} goes on in the cloud. {_remedies(standing.job)}")
        elif standing.is_asked_for:
            output.line(f"the cloud was asked to start the job and did not answer; it may run there. {_LOOK}")
        raise


def _remedies(job: str) -> str:
    return f"Watch it again: edgefl jobs watch {job}; end it: edgefl jobs cancel {job}"


def round_text(outcome: RoundReport, count: int | None) -> str:
    """Return one line on a finished round, with the reason of each refusal."""
    of = "" if count is None else f"/{count}"
    text = f"round {outcome.round}{of}: {outcome.counts_text()} in {outcome.seconds:.2f} s "
    text += metrics_text(outcome.metrics)
    reasons = "; ".join(f"{device}: {reason}" for device, reason in outcome.reasons.items())
    return one_line(f"{text.rstrip()} ({reasons})" if reasons else text.rstrip())
