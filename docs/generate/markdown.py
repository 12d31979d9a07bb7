"""Pieces of Markdown that the generated pages share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(`[^`]*`)")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its cells are Markdown already. In code, a bar does not end a cell."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_outside_code(cell, '|', chr(92) + '|') for cell in line)} |" for line in lines)


def prose(text: str) -> str:
    """Return a comment or a help message as Markdown: what looks like HTML or a link outside of code is escaped."""
    for old, new in (("<", "&lt;"), ("*", r"\*"), ("] [", r"] \[")):
        text = _outside_code(text, old, new)
    return text


def fenced(text: str, language: str) -> str:
    """Return a block of code."""
    return f"```{language}\n{text}\n```"


def _outside_code(text: str, old: str, new: str) -> str:
    return "".join(part if part.startswith("`") else part.replace(old, new) for part in _CODE.split(text))
