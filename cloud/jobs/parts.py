"""The uploaded parts of a job that is submitted, checked before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloud.state.blobs import BlobStore
from edgefl.errors import ConfigError
from edgefl.protocols.messages import BlobRef
from edgefl.trees import SpooledTree, spec_of
from edgefl.trees.fragments import fragments_of


def check_parts(
    blobs: BlobStore, bundle: BlobRef, parameters: BlobRef, frozen: BlobRef | None, buffers: Sequence[str],
    on_devices: BlobRef | None = None,
) -> None:  # fmt: skip
    """Raise ConfigError for parts that are missing or do not fit, BlobDamaged for a damaged one."""
    named = {"bundle": bundle, "parameters": parameters, "frozen part": frozen, "devices' frozen part": on_devices}
    for part, ref in named.items():
        if ref is None:
            continue
        if not blobs.has(ref.sha256):
            raise ConfigError(f"the job's {part} {ref.sha256[:16]}... is not in the cloud; upload it first")
        blobs.check(ref.sha256)
    tree = SpooledTree(blobs.path(parameters.sha256))
    if unknown := sorted(set(buffers) - set(tree)):
        raise ConfigError(f"buffers {', '.join(unknown)} are not among the job's parameters")
    if frozen is not None and (twice := sorted(set(SpooledTree(blobs.path(frozen.sha256))) & set(tree))):
        raise ConfigError(f"tensors {', '.join(twice):.500} are both among the job's parameters and frozen")


def check_fragments(blobs: BlobStore, parameters: BlobRef, count: int) -> None:
    """Raise ConfigError for parameters that cannot be divided into so many fragments."""
    fragments_of(spec_of(SpooledTree(blobs.path(parameters.sha256))), count)


def frozen_of(row: Any) -> BlobRef | None:
    """Return the blob of a job's frozen tensors, if it has any."""
    if row["frozen_sha256"] is None:
        return None
    return BlobRef(sha256=row["frozen_sha256"], size=row["frozen_size"])
