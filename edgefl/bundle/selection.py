"""Which files of a task's folder go into its bundle.

Hidden files, caches and virtual environments never do. Data, pictures, checkpoints, notebooks and what has more than
1 MB are left out and named, unless `[tool.edgefl] include` in the folder's pyproject.toml has a pattern for them.
Python modules and pyproject.toml always go.
Invariant: only names and sizes are read here, so that a folder of any size is refused, or packed, in bounded memory.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgefl.errors import ConfigError
from edgefl.terminal.text import one_line

MAX_FILE_BYTES = 1_000_000  # of a file that is not asked for
MAX_SEEN = 100_000  # files and folders of a task's folder
MAX_TOLD = 5  # files and folders that were left out
_KINDS = {
    "data": "csv tsv parquet arrow feather npy npz h5 hdf5 mat pkl pickle joblib db sqlite sqlite3 tfrecord lmdb "
    "zip gz tar tgz bz2 xz zst 7z wav mp3 flac ogg mp4 avi mov",
    "a picture": "png jpg jpeg gif bmp tif tiff webp svg pdf",
    "a model": "pt pth ckpt safetensors onnx tflite keras pb bin gguf",
    "a notebook": "ipynb",
    "a log": "log out",
    "a package": "whl egg fab",
}
_KIND_OF = {f".{suffix}": kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}
_OUTPUT_FOLDERS = frozenset({"wandb", "mlruns", "lightning_logs", "node_modules"})
_TOP = PurePosixPath()
_WILD = re.compile(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]")
_REGEX = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file, or a folder of files, that stays behind."""

    name: str  # inside the task's folder; a folder's ends with /
    why: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Selection:
    """What goes into a bundle, by its name there, and what stays behind."""

    files: dict[str, Path]
    left_out: tuple[LeftOut, ...] = ()


def select_files(folder: Path) -> Selection:
    """Choose a task's files; raises ConfigError for links to folders or in a circle, and for a wrong `include`."""
    patterns = included_patterns(folder)
    wanted = [(pattern, _matcher(pattern)) for pattern in patterns]
    used: set[str] = set()
    files: dict[str, Path] = {}
    left: list[LeftOut] = []
    for name, path in walk(folder):
        size = _size(path)
        asked = {pattern for pattern, matches in wanted if matches.fullmatch(name)}
        used |= asked
        if asked or not (why := _why_left_out(name, size)):
            files[name] = path
        else:
            left.append(LeftOut(name, why, size))
    if unused := [pattern for pattern in patterns if pattern not in used]:
        raise ConfigError(
            f"{folder / 'pyproject.toml'}: [tool.edgefl] include: {unused[0]!r} matches no file of the folder. "
            "Patterns are relative to it, such as data/*.csv or **/*.txt; hidden files, caches and environments never "
            "match"
        )
    return Selection(files, tuple(_joined(left, files)))


def walk(root: Path, inside: PurePosixPath = _TOP) -> Iterator[tuple[str, Path]]:
    """Yield (name in the bundle, file) of a folder's files, without hidden files, caches and environments."""
    seen = 0
    for here, folders, files in os.walk(root):
        base = Path(here)
        folders[:] = sorted(name for name in folders if _travels(base / name))
        for name in folders:
            if (base / name).is_symlink():
                raise ConfigError(f"{base / name} is a link to a folder; copy the files themselves into the task")
        seen += len(folders) + len(files)
        if seen > MAX_SEEN:
            raise ConfigError(
                f"{root} has more than {MAX_SEEN} files and folders. Keep data outside the task's folder: pass its "
                "path with `edgefl agent start --data`"
            )
        for name in sorted(files):
            path = base / name
            if name.startswith(".") or path.suffix == ".pyc":
                continue
            if path.is_symlink() and not path.exists():
                raise ConfigError(f"{path} is a link that leads to no file, or to itself; remove it or copy the file")
            if path.is_file():
                yield (inside / PurePosixPath(path.relative_to(root))).as_posix(), path


def included_patterns(folder: Path) -> tuple[str, ...]:
    """Return `[tool.edgefl] include`, and `fab-include` of a Flower app; raises ConfigError if it is no list."""
    tool = _tool(folder)
    ours = _patterns(folder, "tool.edgefl", tool.get("edgefl", {}).get("include", []))
    app = tool.get("flwr", {}).get("app", {})
    theirs = app.get("fab-include", []) if isinstance(app, dict) else []
    # Flower's patterns may be for files that its own rules exclude, so that they need not match.
    names = [name for name, _ in walk(folder)] if theirs else []
    flower = _patterns(folder, "tool.flwr.app", [one.lstrip("/") for one in theirs if isinstance(one, str)])
    return ours + tuple(one for one in flower if any(_matcher(one).fullmatch(name) for name in names))


def left_out_text(left_out: Sequence[LeftOut]) -> str:
    """Return one line that names what stays behind, the largest first; empty if nothing does."""
    if not left_out:
        return ""
    largest = sorted(left_out, key=lambda one: -one.num_bytes)
    told = [f"{one_line(one.name)} ({one.why}, {size_text(one.num_bytes)})" for one in largest[:MAX_TOLD]]
    more = f" and {len(largest) - MAX_TOLD} more" if len(largest) > MAX_TOLD else ""
    return (
        f"not sent to devices: {', '.join(told)}{more}. If the task needs a file there, name it in pyproject.toml: "
        f'[tool.edgefl] include = ["{one_line(largest[0].name)}{"**" if largest[0].name.endswith("/") else ""}"]'
    )


def size_text(num_bytes: float) -> str:
    """Return bytes as `0.5 kB`, `12.3 MB` or `2.1 GB`."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def _why_left_out(name: str, size: int) -> str:
    path = PurePosixPath(name)
    if path.suffix == ".py" or name == "pyproject.toml":
        return ""
    if not _OUTPUT_FOLDERS.isdisjoint(path.parts[:-1]) or path.name.startswith("events.out.tfevents"):
        return "output of another tool"
    if kind := _KIND_OF.get(path.suffix.lower()):
        return kind
    return f"more than {MAX_FILE_BYTES // 1_000_000} MB" if size > MAX_FILE_BYTES else ""


def _joined(left: Sequence[LeftOut], files: dict[str, Path]) -> Iterator[LeftOut]:
    """Yield a folder of which nothing is packed in place of its files, each other file by itself."""
    packed = {part.as_posix() for name in files for part in PurePosixPath(name).parents}
    joined: dict[str, list[LeftOut]] = {}
    for one in left:
        above = [part.as_posix() for part in PurePosixPath(one.name).parents][::-1]
        place = next((f"{part}/" for part in above if part not in packed and part != "."), one.name)
        joined.setdefault(place, []).append(one)
    for place, ones in joined.items():
        if place.endswith("/") and len(ones) > 1:
            yield LeftOut(place, f"{len(ones)} files, {ones[0].why}", sum(one.num_bytes for one in ones))
        else:
            yield from ones


def _travels(folder: Path) -> bool:
    made = folder.name == "__pycache__" or folder.suffix == ".egg-info" or (folder / "pyvenv.cfg").exists()
    return not made and not folder.name.startswith(".")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as cause:
        raise ConfigError(f"cannot read {path}: {cause.strerror}") from cause


def _tool(folder: Path) -> dict[str, Any]:
    try:
        tool = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("tool", {})
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}  # it was read before, when the task was located; a package may have none
    return tool if isinstance(tool, dict) else {}


def _patterns(folder: Path, table: str, value: object) -> tuple[str, ...]:
    listed = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
    if not listed or not isinstance(value, list):
        raise ConfigError(
            f"{folder / 'pyproject.toml'}: [{table}] include is {value!r:.100}; expected a list of patterns, "
            'such as ["vocabulary.csv", "data/**"]'
        )
    for one in value:
        if one.startswith(("/", "~")) or ".." in PurePosixPath(one).parts:
            raise ConfigError(
                f"{folder / 'pyproject.toml'}: [{table}] include: {one!r} leads out of the folder; copy the file "
                "into it"
            )
    return tuple(value)


def _matcher(pattern: str) -> re.Pattern[str]:
    """Return what a pattern matches: * and ? within one name, ** across folders; a folder's name means all in it."""
    pattern = f"{pattern}**" if pattern.endswith("/") else pattern
    regex, end = "", 0
    for found in _WILD.finditer(pattern):
        regex += re.escape(pattern[end : found.start()]) + _REGEX.get(found[0], found[0].replace("[!", "[^"))
        end = found.end()
    return re.compile(f"(?s:{regex}{re.escape(pattern[end:])}(?:/.*)?)")
