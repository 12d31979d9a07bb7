"""Home folders: their kind, their format, and a lock so that only one process uses each.

A home has a file `home.json` with its kind and format. A newer format is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgefl.errors import HomeError
from edgefl.process.version import __version__

FORMAT = 1


def create_home(folder: Path, kind: str) -> None:
    """Create a home (mode 0700) unless the folder is already one of this kind; raises HomeError."""
    marker = folder / "home.json"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        inside = [entry.name for entry in folder.iterdir()]
        if not inside:
            replace_file(marker, json.dumps({"kind": kind, "format": FORMAT, "made_by": __version__}).encode())
            return
    except OSError as cause:
        raise HomeError(f"cannot use {folder} as a home: {_why_not(folder, cause)}") from cause
    if marker.name not in inside:
        raise HomeError(f"{folder} is not empty and not an edgefl home; choose another --home")
    check_home(folder, kind)


def _why_not(folder: Path, cause: OSError) -> str:
    """Return why a folder cannot be a home, and what to do."""
    if isinstance(cause, PermissionError):
        return f"{cause.strerror}; choose another --home, or run this as a user with write permission"
    if file := next((one for one in (folder, *folder.parents) if one.is_file()), None):
        return f"{file} is a file, but a home must be a folder; choose another --home"
    return f"{cause.strerror}; choose another --home"


def check_home(folder: Path, kind: str) -> None:
    """Raise HomeError unless the folder is a home of this kind in a known format."""
    marker = folder / "home.json"
    try:
        facts = json.loads(marker.read_text(encoding="utf-8"))
        seen_kind, seen_format = str(facts["kind"]), int(facts["format"])
    except (FileNotFoundError, NotADirectoryError) as cause:
        if folder.is_file():
            raise HomeError(f"{folder} is a file, not the home of an edgefl {kind}; name its folder") from cause
        hint = "`edgefl agent enroll` makes one" if kind == "agent" else "`edgefl cloud start` makes one"
        raise HomeError(f"{folder} is not the home of an edgefl {kind} (no home.json); {hint}") from cause
    except PermissionError as cause:
        raise HomeError(f"{folder} belongs to another user; run this as that user or as root") from cause
    except (ValueError, KeyError, TypeError) as cause:
        raise HomeError(f"{marker} is damaged: {cause}. Restore it from a backup or choose another --home") from cause
    if seen_kind != kind:
        raise HomeError(
            f"{folder} is the home of an edgefl {seen_kind}, not of an edgefl {kind}; choose another --home"
        )
    if seen_format > FORMAT:
        raise HomeError(
            f"{folder} has format {seen_format}, made by edgefl {facts.get('made_by', '?')}; this is edgefl "
            f"{__version__}, which knows format {FORMAT}. Install that version, or choose another --home"
        )


def lock_home(folder: Path) -> IO[str]:
    """Lock the home until the returned file is closed or the process ends; raises HomeError if it is locked."""
    file = os.fdopen(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as cause:
        file.seek(0)
        holder = file.read().strip() or "?"
        file.close()
        raise HomeError(f"{folder} is in use by process {holder}; stop it, or choose another --home") from cause
    # The pid is only for the message above; a full disk must not prevent the lock.
    with suppress(OSError):
        os.pwrite(file.fileno(), f"{os.getpid():<20}".encode(), 0)
    return file


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that uses a home."""

    pid: int  # 0 = not known, because the disk was full
    since_s: float  # seconds since 1970


def home_holder(folder: Path) -> Holder | None:
    """Return the process that has locked the home, None if there is none; does not lock it."""
    try:
        with (folder / "lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = file.read().strip()
                return Holder(int(pid) if pid.isdecimal() else 0, os.fstat(file.fileno()).st_mtime)
    except FileNotFoundError:
        return None
    return None


def home_in_use(folder: Path) -> bool:
    """Whether a process has locked the home; does not lock it."""
    return home_holder(folder) is not None


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader, or a crash, sees the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
