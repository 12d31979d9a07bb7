"""A release on a base that this device has: only the patch is downloaded, and the file is made here.

The base is the file of a slot, or the one kept for it: a link, so that a base costs its space once. The result is
checked against the signed hash by the caller; whatever is wrong with a base or a patch costs a complete download.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from edge_agent.disk import space_for
from edge_agent.link.channel import CloudChannel
from edge_agent.link.transfer import download
from edge_agent.releases.slots import ModelSlots
from edgefl.errors import DiskFull, ManifestRejected, ProtocolError
from edgefl.logs import event
from edgefl.protocols.manifest import Release, check_blob
from edgefl.protocols.messages import BlobRef

_log = logging.getLogger(__name__)


async def make_from_base(channel: CloudChannel, release: Release, slots: ModelSlots, path: Path) -> bool:
    """Make a release's file at `path` from its base and its patch; False if it has none, or that is not possible."""
    base, patch = release.base, release.patch
    if base is None or patch is None:
        return False
    held = await asyncio.to_thread(_held, slots, base)
    if held is None:
        return False
    fetched, made = slots.base_path().with_name("patch.safetensors"), path.with_name(f"{path.name}.part")
    try:
        await download(channel, patch, fetched)
        with space_for(made, release.blob.size, f"{release.model} version {release.version}"):
            await asyncio.to_thread(_make, held, fetched, made, release)
        await asyncio.to_thread(_keep, slots, held)
    except (ProtocolError, ManifestRejected, DiskFull) as error:
        event(_log, logging.WARNING, "release.not_patched", model=release.model, version=release.version, reason=error)
        return False
    finally:
        fetched.unlink(missing_ok=True)
    made.replace(path)
    event(_log, logging.INFO, "release.patched", model=release.model, version=release.version, bytes=patch.size,
          instead_of=release.blob.size)  # fmt: skip
    return True


def _held(slots: ModelSlots, base: BlobRef) -> Path | None:
    """Return a file with the base's bytes: the one that was kept, or one in a slot, also in the one to write to."""
    for path in (slots.base_path(), *slots.whole_files()):
        try:
            check_blob("the base", base, path)
        except (ManifestRejected, OSError):
            continue
        return path
    return None


def _make(base: Path, patch: Path, made: Path, release: Release) -> None:
    from edgefl.models.adapters.patch import apply_patch  # numpy, which an idle agent does not load
    from edgefl.trees import SpooledTree

    try:
        apply_patch(base, SpooledTree(patch), made)
        check_blob(f"{release.model} version {release.version}, made of its base,", release.blob, made)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def _keep(slots: ModelSlots, base: Path) -> None:
    """Keep the base for the next release on it, when its slot is used for another."""
    kept = slots.base_path()
    if base == kept:
        return
    link = kept.with_name("base.new")
    link.unlink(missing_ok=True)
    os.link(base, link)
    link.replace(kept)
