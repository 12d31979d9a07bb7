"""The page "What models work": read as cells by kind and column, and written from them.

A cell is `yes`, `-` (there is nothing to try), or a refusal without backticks, which stands below the table.
Invariant: `read(written(rows)) == rows`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "kinds.md"
COLUMNS = (
    "simulate: `loop`", "simulate: `stacked`", "simulate: `pool`", "run on devices", "publish", "publish as int8",
    "serve", "prediction",
)  # fmt: skip
YES, NOTHING = "yes", "-"
Row = Mapping[str, str]  # column -> cell

_HEAD = (
    "# What models work\n\n"
    "Each cell of this table was measured: `python -m tests.kinds` writes this page, and `make soak` fails if it is no "
    "longer true. A number stands for a refusal, in edgefl's own words, [below the table](#refusals). `-` means that "
    "there was nothing to try, because an earlier step was refused. "
    "Kinds that are not in the table were not measured.\n"
)
_LEGEND = (
    "\n"
    "- **simulate**: two clients, two rounds. `loop` gives the parameters that plain PyTorch gives (not compared for "
    "scikit-learn, and where training draws random numbers); `stacked` and `pool` give those of `loop`.\n"
    "- **run on devices**: two agents, two rounds; the parameters are those of `loop`.\n"
    "- **publish**, **publish as int8**: the cloud has a signed release, in the weights' own type and compressed with "
    "`--max-drop 0.05`.\n"
    "- **serve**: both devices took the uncompressed release and answer requests.\n"
    "- **prediction**: what they answer equals the outputs of PyTorch, or of the library.\n"
    "\n"
    "The models are small, and their data are made up: `tests/kinds/task`.\n"
    "\n"
    "## Refusals\n"
)


def written(rows: Mapping[str, Row]) -> str:
    """Return the page."""
    notes: dict[str, int] = {}

    def cell(text: str) -> str:
        return text if text in {YES, NOTHING} else f"[{notes.setdefault(text, len(notes) + 1)}](#refusals)"

    lines = [["kind of model", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    lines += [[kind, *(cell(row[column]) for column in COLUMNS)] for kind, row in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    told = "\n".join(f"{number}. `{text}`" for text, number in notes.items())
    return f"{_HEAD}\n{table}\n{_LEGEND}\n{told or 'There are none.'}\n"


def read(page: str) -> dict[str, Row]:
    """Return the rows of a page."""
    notes = dict(re.findall(r"^(\d+)\. `(.+)`$", page, re.MULTILINE))
    rows = {}
    for line in [one for one in page.splitlines() if one.startswith("| ")][2:]:
        kind, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        shown = [re.sub(r"\[(\d+)\]\(#refusals\)", lambda found: notes[found[1]], cell) for cell in cells]
        rows[kind] = dict(zip(COLUMNS, shown, strict=True))
    return rows
