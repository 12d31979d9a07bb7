"""Output of commands: lines and tables for people, JSON for programs.

A table is drawn on a terminal, and printed as plain lines elsewhere. If JSON goes to stdout (`--json -`), all other
output goes to stderr, so that stdout holds only JSON: text for people, and what the user's code prints, in this
process or in its children.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TextIO, TypeVar

import click

from edgefl.errors import ConfigError
from edgefl.process.home import replace_file
from edgefl.terminal.text import lines, one_line

_P = ParamSpec("_P")
_DEVICES = "devices/"  # begins the names of federated evaluation
_T = TypeVar("_T")

INTERRUPTED = 130  # exit status after SIGINT, as in shells
GAP_CHARS = 2  # between the columns of a table
WRAPPED_CHARS = 10  # a column whose cells may be wrapped needs this much
NO_STYLES: Mapping[str, str] = MappingProxyType({})


class Output:
    """One command's output and result; `results` receives the JSON for `-`."""

    def __init__(self, json_target: str | None = None, results: TextIO | None = None) -> None:
        self._json, self._results = json_target, results
        self._to_stderr = json_target == "-"
        if json_target not in {None, "-"}:
            refuse_no_folder(Path(str(json_target)), "--json")

    @property
    def json_alone(self) -> bool:
        """Whether stdout is for JSON only."""
        return self._to_stderr

    def line(self, text: str) -> None:
        """Print a line for people; control characters are escaped."""
        click.echo(lines(text), err=self._to_stderr)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str,
        styles: Mapping[str, str] = NO_STYLES, *, whole: Sequence[str] = (), spare: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Print a table: drawn on a terminal, with `styles` for words in it; elsewhere one line per row, with tabs.

        On a terminal, cells of the columns `whole`, which people copy, stay on one line; others are wrapped. If there
        is not enough room, the columns `spare` are left out, in this order, with a note.
        """
        if not rows:
            self.line(empty)
            return
        texts = [[_shown(cell) for cell in row] for row in rows]
        if not (sys.stderr if self._to_stderr else sys.stdout).isatty():
            for row in [list(columns), *texts]:
                self.line("\t".join(row))
            return
        self._draw(columns, texts, styles, whole, spare)

    def _draw(
        self, columns: Sequence[str], texts: Sequence[Sequence[str]], styles: Mapping[str, str],
        whole: Sequence[str], spare: Sequence[str],
    ) -> None:  # fmt: skip
        from rich.cells import cell_len
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(file=sys.stderr if self._to_stderr else sys.stdout, markup=False, highlight=False)
        widths = {
            name: max(cell_len(text) for text in (name, *(row[at] for row in texts))) for at, name in enumerate(columns)
        }
        least = {name: width if name in whole else min(width, WRAPPED_CHARS) for name, width in widths.items()}
        left_out: list[str] = []
        for name in spare:
            shown = [one for one in columns if one not in left_out]
            if sum(least[one] for one in shown) + GAP_CHARS * (len(shown) - 1) <= console.width:
                break
            left_out.append(name)
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP_CHARS, 0, 0))
        for name in columns:
            if name not in left_out:
                kept = name in whole
                table.add_column(name, no_wrap=kept, min_width=widths[name] if kept else None, overflow="fold")
        for row in texts:
            cells = [text for name, text in zip(columns, row, strict=True) if name not in left_out]
            table.add_row(*(Text(text, styles.get(text, "")) for text in cells))
        console.print(table, crop=False)
        if left_out:
            self.line(f"(no room for: {', '.join(left_out)}; --json - and wider windows have them)")

    def result(self, value: Any) -> None:
        """Write the result to the target of `--json`, if it was given."""
        if self._json is None:
            return
        text = json.dumps(_without_nan(value), indent=1).replace("\x7f", "\\u007f")
        if self._json == "-":
            click.echo(text, self._results)
            return
        path = Path(self._json)
        try:
            replace_file(path, text.encode() + b"\n")
        except OSError as cause:
            raise ConfigError(f"cannot write --json {path}: {cause.strerror}") from cause


def example(*lines: str) -> str:
    """Return a command's epilog: an example that click prints without reformatting."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def json_option(command: Callable[_P, _T]) -> Callable[..., _T]:
    """Add `--json FILE` to a command, and the parameter `output`."""

    @click.option("--json", "json_target", metavar="FILE", help="Write the result as JSON; - for stdout.")
    @functools.wraps(command)
    def with_output(*arguments: Any, json_target: str | None, **options: Any) -> _T:
        with stdout_for_results() if json_target == "-" else nullcontext(None) as results:
            output = Output(json_target, results)
            return command(*arguments, output=output, **options)  # type: ignore[arg-type]  # what click gives is checked by click

    return with_output


@contextmanager
def stdout_for_results() -> Iterator[TextIO]:
    """Reserve stdout for results: other output to it, also from children and C code, goes to stderr."""
    results = sys.stdout
    try:
        stdout, stderr = results.fileno(), sys.stderr.fileno()
    except (OSError, ValueError):  # not real files, as in a test
        with redirect_stdout(sys.stderr):
            yield results
        return
    results.flush()
    with os.fdopen(os.dup(stdout), "w", encoding=results.encoding) as kept, redirect_stdout(sys.stderr):
        os.dup2(stderr, stdout)
        try:
            yield kept
        finally:
            kept.flush()
            results.flush()
            os.dup2(kept.fileno(), stdout)


def refuse_no_folder(path: Path | None, flag: str) -> None:
    """Raise ConfigError before the work if a file could not be written after it."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {folder}; create it, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: no permission to write in {folder}; choose another folder")


def counted(number: int, noun: str) -> str:
    """Return `1 device`, `2 devices`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def time_text(seconds: float | None) -> str:
    """Return a time of day by this machine's clock; a dash for None."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def ago_text(seconds: float) -> str:
    """Return how long ago something was: `5 s ago`, `3 min ago`, `2 h ago`, `4 d ago`."""
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit_s or (seconds >= unit_s and unit == "min"):
            return f"{seconds // unit_s:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def metrics_text(metrics: Mapping[str, float | None]) -> str:
    """Return metrics as `accuracy=0.97 loss=0.1`, see `metric_texts`."""
    return " ".join(f"{one_line(name)}={value}" for name, value in metric_texts(metrics).items())


def metric_texts(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """Return each metric's text by its name, in the order of the names; a dash for one that is null in JSON.

    Those of federated evaluation are shortened to `devices/accuracy`: `0.9±0.05 (worst tenth 0.8)`, and their loss and
    the number of devices left out if there are others.
    """
    devices = {name: value for name, value in metrics.items() if name.startswith(_DEVICES)}
    known = {name: "-" if value is None else f"{value:.4g}" for name, value in sorted(metrics.items())}
    return {name: text for name, text in known.items() if name not in devices} | _on_devices(devices, known)


def _on_devices(names: Collection[str], known: Mapping[str, str]) -> dict[str, str]:
    """Return the text of each metric of federated evaluation."""
    means = [name for name in known if f"{name}/std" in names]
    shown = {}
    for name in [name for name in means if name != f"{_DEVICES}loss"] or means:
        worst = known.get(f"{name}/worst_tenth")
        shown[name] = f"{known[name]}±{known[f'{name}/std']}" + (f" (worst tenth {worst})" if worst else "")
    return shown


def _shown(cell: object) -> str:
    return "-" if cell is None or cell == "" else one_line(str(cell))


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
