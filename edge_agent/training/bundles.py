"""Task bundles on the device. Signature and hash are verified before a bundle is unpacked or run.

Each bundle is verified once per agent process; files that an earlier process left on disk are not trusted.
The trainer unpacks a bundle next to its archive, because that process has limited memory and the needed imports.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.link.channel import CloudChannel
from edge_agent.link.transfer import download
from edgefl.errors import ManifestRejected
from edgefl.protocols.manifest import Bundle, check_blob, verify
from edgefl.protocols.messages import Signed

MAX_KEPT = 8  # archives, and working folders of tasks
MAX_ARCHIVE_BYTES = 64 << 20


class Bundles:
    """The bundles of this process's plans: `HOME/bundles/<sha256>.zip`."""

    def __init__(self, home: Path, fleet_key: Ed25519PublicKey, channel: CloudChannel) -> None:
        self._folder = home / "bundles"
        self._fleet_key, self._channel = fleet_key, channel
        self._verified: dict[Signed, Bundle] = {}  # all plans of a job name the same bundle
        self._archives: dict[str, Path] = {}  # by digest, least recently used first
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)

    async def get(self, signed: Signed) -> tuple[Path, str]:
        """Return a bundle's archive and its task's name; raises ManifestRejected, ProtocolError, CloudUnreachable."""
        if signed not in self._verified:
            bundle = verify(signed, Bundle, self._fleet_key)
            self._verified = dict([*self._verified.items(), (signed, bundle)][-MAX_KEPT:])
        bundle = self._verified[signed]
        digest = bundle.blob.sha256
        if digest not in self._archives:
            self._archives[digest] = await self._fetch(bundle)
        archive = self._archives[digest] = self._archives.pop(digest)
        self._forget_oldest()
        return archive, bundle.task

    async def _fetch(self, bundle: Bundle) -> Path:
        if bundle.blob.size > MAX_ARCHIVE_BYTES:
            raise ManifestRejected(f"the bundle has {bundle.blob.size} bytes; at most {MAX_ARCHIVE_BYTES} are allowed")
        archive = self._folder / f"{bundle.blob.sha256}.zip"
        await download(self._channel, bundle.blob, archive)
        check_blob("the bundle", bundle.blob, archive)
        return archive

    def _forget_oldest(self) -> None:
        while len(self._archives) > MAX_KEPT:
            archive = self._archives.pop(next(iter(self._archives)))
            archive.unlink(missing_ok=True)
            shutil.rmtree(archive.with_suffix(""), ignore_errors=True)


def work_folder(home: Path, archive: Path) -> Path:
    """Return the working folder of a bundle's task, where files with relative names go.

    It persists between rounds and across restarts of the agent; the least recently used folders are deleted.
    """
    folders = home / "tasks"
    folder = folders / archive.stem[:32]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.utime(folder)
    by_age = sorted(folders.iterdir(), key=lambda one: one.stat().st_mtime)
    for oldest in by_age[:-MAX_KEPT]:
        shutil.rmtree(oldest)
    return folder
