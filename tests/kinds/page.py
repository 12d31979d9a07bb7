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
    "serve", "prediction", "serve int8",
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
    "- **simulate**: two clients, two rounds. `loop` gives the parameters that plain PyTorch or Keras gives (not "
    "compared for scikit-learn and XGBoost, and where training draws random numbers); `stacked` and `pool` give those "
    "of `loop`.\n"
    "- **run on devices**: two agents, two rounds; the parameters are those of `loop`.\n"
    "- **publish**, **publish as int8**: the cloud has a signed release, in the weights' own type and compressed with "
    "`--max-drop 0.05`.\n"
    "- **serve**: both devices took the uncompressed release and answer requests.\n"
    "- **prediction**: what they answer equals the outputs of PyTorch, or of the library.\n"
    "- **serve int8**: both devices took the int8 release, too; what they answer equals the outputs of the int8 file, "
    "and differs from those of PyTorch by less than a fifth of the largest one.\n"
    "\n"
    "The models are small, and their data are made up: `tests/kinds/task`. XGBoost and Keras are "
    "`examples/tabular/trees` and `examples/keras-app`.\n"
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
    """Return the rows of a page; a column that it does not have yet is `-`."""
    notes = dict(re.findall(r"^(\d+)\. `(.+)`$", page, re.MULTILINE))
    rows = {}
    head, _, *lines = (
        [cell.strip() for cell in one.strip("|").split(" | ")] for one in page.splitlines() if one.startswith("| ")
    )
    for kind, *cells in lines:
        shown = [re.sub(r"\[(\d+)\]\(#refusals\)", lambda found: notes[found[1]], cell) for cell in cells]
        rows[kind] = dict.fromkeys(COLUMNS, NOTHING) | dict(zip(head[1:], shown, strict=True))
    return rows
