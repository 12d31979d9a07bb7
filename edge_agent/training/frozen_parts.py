"""Frozen tensors of the device's jobs: downloaded once per job and kept until the job ends.

    HOME/frozen/<hash of the job's id>/job        the id
    HOME/frozen/<hash of the job's id>/<sha256>   the tensors

Jobs on the same backbone share the file. Files of an earlier process are not downloaded again, but their hash is
checked before use.
Invariant: a returned path has the bytes that its name (a hash) says; a job that has ended keeps nothing here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from edge_agent.link.channel import CloudChannel
from edge_agent.link.transfer import download
from edgefl.errors import ProtocolError
from edgefl.protocols.messages import BlobRef

_SHA256 = re.compile("[0-9a-f]{64}")
_JOB = "job"


class FrozenParts:
    """The frozen tensors of this device's jobs. Used from its event loop."""

    def __init__(self, home: Path, channel: CloudChannel) -> None:
        self._root, self._channel = home / "frozen", channel
        self._checked: set[Path] = set()  # by this process
        for folder in self._root.glob("*"):
            if not (folder / _JOB).is_file() or not (folder / _JOB).stat().st_size:  # a process was killed in between
                shutil.rmtree(folder, ignore_errors=True)

    def jobs(self) -> list[str]:
        """Return the jobs that have frozen tensors on this device."""
        return sorted(file.read_text(encoding="utf-8") for file in self._root.glob(f"*/{_JOB}"))

    async def get(self, job: str, ref: BlobRef) -> Path:
        """Return a job's frozen tensors; raises what `download` raises, and OSError."""
        if _SHA256.fullmatch(ref.sha256) is None:
            raise ProtocolError(f"the plan names its frozen part {ref.sha256[:80]!r}; expected a SHA-256 in hex")
        path = self._folder(job) / ref.sha256
        if path in self._checked:
            return path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (path.parent / _JOB).write_text(job, encoding="utf-8")
        shared = next((one for one in self._checked if one.name == ref.sha256), None)
        if shared is not None:
            path.unlink(missing_ok=True)
            os.link(shared, path)
        else:
            if path.exists():
                path.replace(path.with_name(f"{path.name}.part"))  # from an earlier process: `download` checks it
            await download(self._channel, ref, path)
        self._checked.add(path)
        return path

    def forget(self, job: str) -> None:
        """Delete a job's tensors: the job has ended. Raises OSError."""
        folder = self._folder(job)
        self._checked = {path for path in self._checked if path.parent != folder}
        if folder.exists():
            shutil.rmtree(folder)

    def _folder(self, job: str) -> Path:
        return self._root / hashlib.sha256(job.encode()).hexdigest()[:32]  # a job's id may not be a valid file name
