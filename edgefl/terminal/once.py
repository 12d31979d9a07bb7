"""Reasons that are said once: those that repeat from round to round are left out."""

from __future__ import annotations

from collections.abc import Mapping

from edgefl.terminal.text import grouped, one_line


class Once:
    """Remembers which reasons were said, by name."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def text(self, reasons: Mapping[str, str], most: int | None = None) -> str:
        """Return the new reasons, each once with the names that have it, at most `most`; empty if there are none."""
        new = {name: reason for name, reason in reasons.items() if self._said.get(name) != reason}
        self._said |= new
        return one_line(grouped(new, most))
