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
    end: str = ""  # where the log ends: the `after` of the next call


def read_tail(
    path: Path, records: int, keep: Callable[[str], bool] = lambda _line: True, max_bytes: int = MAX_BYTES,
    after: str = "",
) -> LogTail:  # fmt: skip
    """Return the last records whose first line `keep` accepts; none if there is no log. Raises OSError.

    With `after`, the `end` of an earlier call, only what was written since then.
    """
    lines, end = _backwards(path, after)
    found, cut = _last_records(lines, records, keep, max_bytes)
    return LogTail(found, cut, end)


def _last_records(
    lines: list[str], records: int, keep: Callable[[str], bool], max_bytes: int
) -> tuple[list[str], bool]:  # fmt: skip
    """Return the kept records in their order, and whether earlier ones were left out."""
    found: list[str] = []
    size, count, kept_size = 0, 0, 0
    trace: list[str] = []
    for line in lines:
        trace.append(line)
        size += len(line.encode()) + 1
        if line.startswith(" "):
            if size > max_bytes:  # a trace that is too long by itself
                return found[::-1], True
            continue
        if keep(line):
            if count == records or kept_size + size > max_bytes:
                return found[::-1], True
            found += trace
            count, kept_size = count + 1, kept_size + size
        trace, size = [], 0
    return found[::-1], False


def of_job(job: str) -> Callable[[str], bool]:
    """Return whether a line of a log is about a job, or a relay."""
    pattern = re.compile(rf"\s(?:job|relay)={re.escape(job)}(?:\s|$)")
    return lambda line: pattern.search(line) is not None


def without_secrets(text: str) -> str:
    """Return a text without enrolment tokens, bearer tokens and private keys."""
    return _SECRET.sub(HIDDEN, text)


def _backwards(path: Path, after: str) -> tuple[list[str], str]:
    """Return the whole lines of a log, the newest first, and where they end, as `INODE:OFFSET`."""
    before, _, offset = after.partition(":")
    text, end = "", after
    for one in (path.with_name(f"{path.name}.1"), path):
        try:
            with one.open("rb") as file:
                facts = os.fstat(file.fileno())
                is_known = str(facts.st_ino) == before and int(offset) <= facts.st_size  # a number is used again
                start = int(offset) if is_known else 0
                start = max(start, facts.st_size - (2 << 20))  # a file has less
                file.seek(start)
                whole = file.read().rpartition(b"\n")[:2]
        except FileNotFoundError:
            continue
        new = b"".join(whole)
        text = ("" if is_known else text) + new.decode("utf-8", "replace")  # the file before has been read, too
        end = f"{facts.st_ino}:{start + len(new)}"
    return without_secrets(text).splitlines()[::-1], end
