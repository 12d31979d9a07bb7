"""What one side kept of a training in a round: its part before some steps, the two latest, in one file each.

After a kill both sides continue from the latest step that both have kept.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgefl.trees import SpooledTree, Tree, write_tree

MAX_KEPT = 2


class PartCheckpoints:
    """Files `PREFIX.STEP` of one training."""

    def __init__(self, prefix: Path, *, is_only: bool = False) -> None:
        """`prefix` is a path without a point in its name (`is_only`: and others are deleted). Raises OSError."""
        self._prefix = prefix
        prefix.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in prefix.parent.iterdir() if is_only else ():
            if file.stem != prefix.name or not file.suffix[1:].isdecimal():
                file.unlink()

    def steps(self) -> list[int]:
        """Return the steps before which a state is kept, in order."""
        found = (file.suffix[1:] for file in self._prefix.parent.glob(f"{self._prefix.name}.*"))
        return sorted(int(one) for one in found if one.isdecimal())

    def keep(self, step: int, snapshot: Tree) -> None:
        """Keep a state, durably."""
        path = self._path(step)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            write_tree(snapshot, file)
            file.flush()
            os.fdatasync(file.fileno())
        part.replace(path)
        for old in self.steps()[:-MAX_KEPT]:
            self._path(old).unlink()

    def load(self, step: int) -> Tree:
        """Return a state that is kept."""
        return SpooledTree(self._path(step))

    def forget(self, steps: Sequence[int] | None = None) -> None:
        """Delete states, all by default."""
        for step in self.steps() if steps is None else steps:
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}.{step}")
