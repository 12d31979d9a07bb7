"""The name that an operator gives a job (`edgefl run --name`), and what an operator's word for a job means.

A job is meant by its id, by the beginning of its id, or by its name. Names need not be unique: an operator is told
which jobs have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgefl.errors import ConfigError
from edgefl.terminal.text import is_safe

MAX_LABEL_CHARS = 100
KINDS = ("job-", "relay-")  # how ids begin


def check_label(label: str | None, flag: str = "--name") -> None:
    """Raise ConfigError for a name that cannot be shown on one line, or that looks like an id."""
    if label is None:
        return
    if not label.strip() or label != label.strip() or len(label) > MAX_LABEL_CHARS or not is_safe(label):
        raise ConfigError(
            f"{flag} {label[:MAX_LABEL_CHARS]!r}: expected 1 to {MAX_LABEL_CHARS} characters on one line, without "
            "blanks at the ends"
        )
    if label.startswith(KINDS):
        raise ConfigError(f"{flag} {label!r}: names that begin with {' or '.join(KINDS)} are for ids; choose another")


def meant_by(word: str, jobs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the jobs that a word may mean: the one with this id, else those with this name or this begin of an id.

    The begin of an id may be given without `job-` or `relay-`.
    """
    found = [dict(one) for one in jobs]
    if exact := [one for one in found if one["id"] == word]:
        return exact
    begins = (word, *(f"{kind}{word}" for kind in KINDS)) if word else ()
    return [one for one in found if one.get("label") == word or str(one["id"]).startswith(begins)]
