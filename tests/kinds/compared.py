"""How a cell of the table is found: a refusal's words, and whether arrays are equal."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from edgefl.trees import Tree


def refusal(error: Exception, folder: Path) -> str:
    """Return a refusal's words, without what differs from machine to machine: paths, bytes, digits of what was lost."""
    text = re.sub(r"\d+\.\d{4}", "N", str(error).replace(f"{folder}/", ""))
    return re.sub(r"\d+(?= bytes|$)", "N", " ".join(text.replace("`", "'").split()))


def same(seen: Tree, wanted: Tree, within: float, what: str) -> None:
    """Raise AssertionError unless two sets of arrays are equal up to rounding."""
    assert set(seen) == set(wanted), f"{what}: {sorted(seen)} instead of {sorted(wanted)}"
    for name, array in wanted.items():
        one, other = np.asarray(seen[name]), np.asarray(array)
        assert one.shape == other.shape, f"{what}: {name} has the shape {one.shape} instead of {other.shape}"
        one, other = one.astype(np.float64), other.astype(np.float64)
        allowed = within * max(1.0, float(np.abs(other).max(initial=0)))
        assert float(np.abs(one - other).max(initial=0)) <= allowed, f"{what}: {name} differs"  # NaN differs
