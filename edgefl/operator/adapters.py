"""Adapters as releases on their base, and at a chosen rank.

Invariant: the published file is the exported one, which was tried and measured; the patch makes just this file of the
base's, which is checked before it is published.
"""

from __future__ import annotations

import dataclasses
import filecmp
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgefl.errors import ConfigError
from edgefl.operator.client import CloudClient
from edgefl.operator.publish import Exported
from edgefl.operator.run import download
from edgefl.protocols.manifest import Release
from edgefl.protocols.messages import from_json
from edgefl.task import Task
from edgefl.trees import SpooledTree, factors_of, write_tree

if TYPE_CHECKING:
    from edgefl.models.adapters.patch import Move


def untrained(task: Task, folder: Path) -> Path:
    """Write a task's first parameters, with which every job begins: a base, to be published before its adapters."""
    from edgefl.training.local import initial_parameters

    path = folder / "untrained.safetensors"
    with path.open("wb") as file:
        write_tree(initial_parameters(task), file)
    return path


def at_rank_in(parameters: Path, rank: int, folder: Path) -> tuple[Path, float]:
    """Write parameters whose adapters have this rank at most; return the file and the relative error."""
    from edgefl.models.adapters.ranks import at_rank

    tree, error = at_rank(SpooledTree(parameters), rank)
    path = folder / f"rank-{rank}.safetensors"
    with path.open("wb") as file:
        write_tree(tree, file)
    return path, error


def base_release(client: CloudClient, model: str, version: int) -> Release:
    """Return a published version as a base; raises NotFound."""
    found = next((one for one in client.model(model) if one["version"] == version), None)
    if found is None:
        raise ConfigError(f"{model} has no version {version}. List its versions with `edgefl models show {model}`")
    return from_json(Release, found)


def on_base(client: CloudClient, base: Release, exported: Exported, task: Task, parameters: Path) -> Exported:
    """Return an export with the patch that makes it of a published version; raises ConfigError for another base."""
    from edgefl.models.adapters.patch import Move
    from edgefl.training.adapters import adapters_of
    from edgefl.training.local import make_model

    tree, folder = SpooledTree(parameters), exported.path.parent
    adapters = adapters_of(task.name, make_model(task))
    if not adapters:
        raise ConfigError(f"task {task.name!r}: its model has no trained adapters. Publish it without --base")
    moves = []
    for one in adapters:
        pair, weight = factors_of(tree, one.matrix), tree[one.weight]
        if pair is not None and pair.rank and weight.dtype.itemsize == 4:
            turned = one.layer.fan_in_fan_out
            moves.append(Move(one.weight, weight.T if turned else weight, pair))
    before = folder / "base.onnx"
    download(client, base.blob.sha256, before)
    patch, note = patch_of(before, exported.path, moves, base.version, folder)
    if len(moves) < len(adapters):
        note += "; some layers have as high a rank as their weights: choose a lower one with --rank"
    notes = "; ".join(one for one in (exported.note, note) if one)
    return dataclasses.replace(exported, base=base.blob, patch=patch, note=notes)


def patch_of(
    base: Path, new: Path, moves: Sequence[Move], version: int, folder: Path, most: float = 1.0
) -> tuple[Path, str]:
    """Write the patch that makes a file of that of a base, and try it; return it with a note for the operator.

    Raises ConfigError for another base, or if more than the share `most` of the bytes differ beside the moves.
    """
    from edgefl.models.adapters.patch import apply_patch, make_patch

    patch, again = folder / "patch.safetensors", folder / "again"
    with patch.open("wb") as file:
        write_tree(make_patch(base, new, moves, most), file)
    apply_patch(base, SpooledTree(patch), again)
    if not filecmp.cmp(again, new, shallow=False):
        raise AssertionError("a patch does not make the file that it was made for")
    again.unlink()
    small, whole = patch.stat().st_size, new.stat().st_size
    note = (
        f"an adapter on version {version}: a device that has it fetches {small / 1024:.0f} KiB instead of "
        f"{whole / 1024:.0f} KiB"
    )
    return patch, note
