"""Adapters of a chosen rank: the nearest matrices, by a singular value decomposition (Eckart & Young 1936).

After several rounds, or of many devices, the exact change of a weight has a high rank, up to that of the weight. A
lower rank is smaller and faster, and is another model: the error is returned, so that it is told and measured.
"""

from __future__ import annotations

import math

import numpy as np

from edgefl.errors import ConfigError
from edgefl.trees import EncodedTree, Factors, Tree, encoded, factors_of
from edgefl.trees.factors import factor_names, is_low_rank

_NOISE = 1e-6  # singular values below this part of the largest are rounding in float32


def factors_at(tree: Tree, name: str, rank: int | None = None) -> Factors:
    """Return a matrix's factors of at most `rank`: those that the tree has, or the nearest; None = all that it is."""
    pair = factors_of(tree, name)
    if pair is not None and (rank is None or pair.rank <= rank):
        return pair
    whole = tree[name]
    left, values, right = np.linalg.svd(whole.astype(np.float64), full_matrices=False)
    own = int(np.count_nonzero(values > _NOISE * values[0])) if values.size and values[0] else 0
    kept = own if rank is None else min(rank, own)
    root = np.sqrt(values[:kept])
    return Factors((left[:, :kept] * root).astype(np.float32), (root[:, None] * right[:kept]).astype(np.float32))


def at_rank(tree: Tree, rank: int) -> tuple[Tree, float]:
    """Return a model's tensors with matrices of at most this rank, and the relative error of all together.

    The error is that of the Frobenius norm: 0 = the same, 1 = nothing is left. Raises ConfigError for a model without
    adapters.
    """
    names = [name for name in tree if is_low_rank(name)]
    if not names:
        raise ConfigError("these parameters have no adapters, so there is no rank to choose. Leave --rank out")
    stored = dict(encoded(tree))
    lost = total = 0.0
    for name in names:
        pair, whole = factors_at(tree, name, rank), tree[name].astype(np.float64)
        lost += float(np.square(whole - pair.product()).sum())
        total += float(np.square(whole).sum())
        for side in (name, *factor_names(name)):
            stored.pop(side, None)
        stored |= dict(zip(factor_names(name), (pair.left, pair.right), strict=True))
    return EncodedTree(stored), math.sqrt(lost / total) if total else 0.0
