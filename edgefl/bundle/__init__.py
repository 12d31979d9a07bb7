"""A task's folder as one file: packed where a job is run, unpacked on devices.

A bundle is a zip whose bytes depend on the files' names and contents alone, so that the same task always has
the same digest. The content of a zip is not trusted, signed or not: names that point outside the folder,
links, and more bytes than the limit are refused.
Invariant: after `unpack_bundle` the folder is complete; before it, and after a failure, the folder does not exist.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from edgefl.bundle.selection import LeftOut, Selection, select_files, size_text, walk
from edgefl.errors import ConfigError, ProtocolError
from edgefl.task import Located, Task, import_task, locate_task, see_working_folder
from edgefl.terminal.text import is_safe

MAX_BUNDLE_BYTES = 64 << 20  # unpacked
MAX_BUNDLE_FILES = 10_000
MAX_NAME_BYTES = 200
MAX_DEPTH = 20
_COPY_BYTES = 1 << 20
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


@dataclass(frozen=True, slots=True)
class PackedBundle:
    """A bundle's bytes, and where the task is inside it."""

    data: bytes
    task: str  # module:attribute
    name: str  # for people: the folder's or the module's name
    left_out: tuple[LeftOut, ...] = ()  # files of the folder that stay behind


def pack_bundle(reference: str) -> PackedBundle:
    """Pack the folder of a task, or the package (or single module) of a `package.module:attribute`.

    What is left out of a folder, `edgefl.bundle.selection` says. Raises ConfigError for a reference that cannot be
    found, and for files beyond the limits.
    """
    return pack_located(locate_task(reference), reference)


def pack_located(located: Located, reference: str) -> PackedBundle:
    """Pack a task that is already located, as `pack_bundle` does; error messages name `reference`."""
    selected = select_files(located.folder) if located.folder is not None else Selection(dict(_files_of(located)))
    files = dict(sorted(selected.files.items()))
    top = located.top_module
    if not any(name == f"{top}.py" or (name.startswith(f"{top}/") and name.endswith(".py")) for name in files):
        raise ConfigError(f"{located.folder} has no module {top!r}, which its task names")
    _refuse_too_much(reference, files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            entry = zipfile.ZipInfo(name, _TIMESTAMP)
            entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    return PackedBundle(buffer.getvalue(), located.task, located.name, selected.left_out)


def unpack_bundle(path: Path, folder: Path) -> None:
    """Unpack into a folder that does not exist yet; an existing folder is complete and is not changed.

    Raises ProtocolError if the file is not a bundle; then nothing is changed.
    """
    if folder.is_dir() and any(folder.iterdir()):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_unsafe(archive.infolist())
            for entry in archive.infolist():
                _extract(archive, entry, half / entry.filename)
        half.chmod(0o755)
        half.rename(folder)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, UnicodeError, struct.error) as cause:
        raise ProtocolError(f"bundle {path.name} is not a complete zip file: {cause}") from cause
    finally:
        shutil.rmtree(half, ignore_errors=True)  # after the rename there is nothing to remove


def load_bundle(folder: Path, task: str) -> Task:
    """Import the task of an unpacked bundle; raises ConfigError or TaskError as `load_task` does."""
    return import_task(task, folder, unpacked=True)


def _files_of(located: Located) -> Iterator[tuple[str, Path]]:
    """Yield (name in the bundle, file) of a module that is not in a task's folder."""
    top = located.top_module
    see_working_folder(top)
    spec = find_spec(top) if top != "__main__" else None
    if spec is None:
        raise ConfigError(f"task {located.task!r}: there is no module {top!r} here to pack")
    homes = list(spec.submodule_search_locations or ())
    if len(homes) == 1:
        yield from walk(Path(homes[0]), PurePosixPath(top))
    elif spec.origin is not None and spec.origin.endswith(".py"):
        yield f"{top}.py", Path(spec.origin)
    else:
        raise ConfigError(f"task {located.task!r}: {top!r} is not in one folder or .py file, so it cannot be packed")


def _refuse_too_much(reference: str, files: dict[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if sum(sizes.values()) > MAX_BUNDLE_BYTES or len(sizes) > MAX_BUNDLE_FILES:
        names = sorted(sizes, key=lambda name: -sizes[name])[:3]
        largest = ", ".join(f"{name} ({size_text(sizes[name])})" for name in names)
        raise ConfigError(
            f"task {reference!r} has {sum(sizes.values()) / 2**20:.1f} MiB in {len(sizes)} files; a bundle may hold "
            f"{MAX_BUNDLE_BYTES >> 20} MiB in {MAX_BUNDLE_FILES}. Keep data outside the folder; largest: {largest}"
        )


def _refuse_unsafe(entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MAX_BUNDLE_FILES or sum(entry.file_size for entry in entries) > MAX_BUNDLE_BYTES:
        raise ProtocolError(
            f"bundle of {len(entries)} files and {sum(entry.file_size for entry in entries)} bytes is above the limits "
            f"of {MAX_BUNDLE_FILES} files and {MAX_BUNDLE_BYTES} bytes"
        )
    names = {entry.filename.casefold() for entry in entries}
    for entry in entries:
        if fault := _unsafe(entry, names) or ("" if is_safe(entry.filename) else "a name with control characters"):
            raise ProtocolError(f"bundle holds {entry.filename!r}, {fault}")
    if len(names) != len(entries):
        raise ProtocolError("bundle holds the same name twice")


def _unsafe(entry: zipfile.ZipInfo, names: set[str]) -> str | None:
    path, kind = PurePosixPath(entry.filename), stat.S_IFMT(entry.external_attr >> 16)
    if not {"", ".", ".."}.isdisjoint(entry.filename.split("/")) or any(char in entry.filename for char in "\\:"):
        return "a name that points outside its folder"
    if max(len(part.encode()) for part in path.parts) > MAX_NAME_BYTES or len(path.parts) > MAX_DEPTH:
        return "a name that is too long"
    if kind not in (0, stat.S_IFREG):
        return "which is not a plain file"
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "which is encrypted or compressed by an unknown method"
    if any(str(parent).casefold() in names for parent in path.parents):
        return "which is inside another file"
    return None


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # zipfile reads at most the size that was checked, and compares the CRC.
    with archive.open(entry) as source, path.open("xb") as target:
        shutil.copyfileobj(source, target, _COPY_BYTES)
        target.flush()
        os.fsync(target.fileno())  # or a power failure could keep the rename and lose the files
