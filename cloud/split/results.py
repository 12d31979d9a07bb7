"""The files of a job's training in parts below the cloud's home: who has finished, and with which tensors.

    HOME/split/<job>/results/<round>/<device>   the cloud's part after this device's training, and its number of samples
    HOME/split/<job>/shared                     the part that all devices share, after the last finished one
    HOME/split/<job>/kept, rows, work           checkpoints, cached activations, the training process's own

The training process writes, the cloud reads after the round and deletes. Both are on one machine.
Invariant: a file is complete, or is not there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np

from edgefl.trees import SpooledTree, Tree, write_tree
from edgefl.trees.views import joined, renamed

SAMPLES = "/samples"  # beside the tensors; no tensor of a model has such a name
FOLDER = "split"


class SplitFolder:
    """The files of one job."""

    def __init__(self, home: Path, job: str) -> None:
        self.path = home / FOLDER / job
        self.kept, self.rows, self.work = self.path / "kept", self.path / "rows", self.path / "work"
        self._results, self.shared = self.path / "results", self.path / "shared"

    def write_result(self, round_number: int, device: str, tensors: Tree, samples: int) -> None:
        """Make a device's result durable: new tensors, and of adapters' matrices the change."""
        folder = self._results / str(round_number)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(joined(tensors, {SAMPLES: np.asarray(samples)}), folder / file_name(device))

    def result(self, round_number: int, device: str) -> tuple[Tree, int] | None:
        """Return a device's tensors and its number of samples; None if it has not finished."""
        path = self._results / str(round_number) / file_name(device)
        if not path.exists():
            return None
        tree = SpooledTree(path)
        return renamed(tree, {name: name for name in tree if name != SAMPLES}), int(tree[SAMPLES])

    def forget_rounds(self, before: int) -> None:
        """Delete the results and the checkpoints of rounds before this one; raises OSError."""
        for root in (self._results, self.kept):
            for folder in root.iterdir() if root.exists() else ():
                if folder.name.isdecimal() and int(folder.name) < before:
                    shutil.rmtree(folder)

    def remove(self) -> None:
        """Delete all that the job has here."""
        shutil.rmtree(self.path, ignore_errors=True)


def folders_of_others(home: Path, jobs: Collection[str]) -> list[SplitFolder]:
    """Return the folders of jobs that are not among these."""
    root = home / FOLDER
    return [SplitFolder(home, one.name) for one in (root.iterdir() if root.exists() else ()) if one.name not in jobs]


def file_name(device: str) -> str:
    """Return a device's file name: its name may have any characters."""
    return hashlib.sha256(device.encode()).hexdigest()[:32]


def write_durably(tree: Tree, path: Path) -> None:
    """Write a tree completely, or not at all; raises OSError."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        write_tree(tree, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
