"""The options and the output of commands that show the end of a log."""

from __future__ import annotations

import click

from edgefl.operator.client import Json
from edgefl.process.log_tail import MAX_RECORDS
from edgefl.terminal.output import Output

LINES = click.option(
    "--lines", "num_lines", type=click.IntRange(1, MAX_RECORDS), default=200, show_default=True,
    help="How many of the last entries; a stack trace belongs to its entry.",
)  # fmt: skip


def print_log(found: Json, output: Output) -> None:
    """Print the lines of a log as they are, and whether earlier ones were left out."""
    if found["cut"]:
        output.line("(earlier entries are left out; --lines shows more of them, up to 256 kB)")
    for line in found["lines"]:
        output.line(str(line))
    if not found["lines"]:
        output.line("the log has no entry")
