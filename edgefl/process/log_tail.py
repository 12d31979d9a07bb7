"""The end of a log file in a home: its last records, within a bound, without what looks like a secret.

A record is a line and the indented lines of its stack trace. The file before the current one, FILE.1, is read, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_RECORDS = 10_000
MAX_BYTES = 256 << 10
HIDDEN = "***"
_SECRET = re.compile(
    r"efl1\.[\w-]+(?:\.[0-9a-f]*)?"  # an enrolment token
    r"|(?<=Bearer )[\w.~+/=-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class LogTail:
    """The last lines of a log."""

    lines: list[str]
    cut: bool  # whether earlier lines were left out


def read_tail(
    path: Path, records: int, keep: Callable[[str], bool] = lambda _line: True, max_bytes: int = MAX_BYTES
) -> LogTail:
    """Return the last records whose first line `keep` accepts; none if there is no log. Raises OSError."""
    found: list[str] = []
    size, count, kept_size = 0, 0, 0
    trace: list[str] = []
    for line in _backwards(path):
        trace.append(line)
        size += len(line.encode()) + 1
        if line.startswith(" "):
            if size > max_bytes:  # a trace that is too long by itself
                return LogTail(found[::-1], cut=True)
            continue
        if keep(line):
            if count == records or kept_size + size > max_bytes:
                return LogTail(found[::-1], cut=True)
            found += trace
            count, kept_size = count + 1, kept_size + size
        trace, size = [], 0
    return LogTail(found[::-1], cut=False)


def of_job(job: str) -> Callable[[str], bool]:
    """Return whether a line of a log is about a job, or a relay."""
    pattern = re.compile(rf"\s(?:job|relay)={re.escape(job)}(?:\s|$)")
    return lambda line: pattern.search(line) is not None


def without_secrets(text: str) -> str:
    """Return a text without enrolment tokens, bearer tokens and private keys."""
    return _SECRET.sub(HIDDEN, text)


def _backwards(path: Path) -> list[str]:
    """Return the lines of a log, the newest first."""
    text = ""
    for one in (path.with_name(f"{path.name}.1"), path):
        try:
            with one.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - (2 << 20)))  # a file has less
                text += file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            continue
    return without_secrets(text).splitlines()[::-1]
