"""Sums of products of low rank, kept as factors: how LoRA's updates are aggregated exactly.

    sum_k w_k B_k A_k  =  [w_1 B_1, w_2 B_2, ..] [A_1; A_2; ..]        (FLoRA: Wang et al. 2024, arXiv 2409.05976)

The mean of products is not the product of means: averaging B and A each by itself gives another matrix. Stacked
factors are the sum itself, for ranks that are equal or not, and stacks of stacks are stacks, at any depth of tiers.
They grow with the cohort: R (N + M) elements for the ranks' sum R. So a matrix (N, M) is summed as a whole, in float64,
as soon as its factors would have as many elements as it, or all factors together `LARGE_BYTES`. Both are exact up to
the rounding of the result. Factors that came in files are read again when they are used, and are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgefl.trees import LARGE_BYTES, Factors, TensorSpec, Tree, factors_of
from edgefl.trees.factors import are_smaller, is_low_rank, stacked
from edgefl.trees.views import renamed

Addends = list[tuple[float, Tree]]  # weights and trees


class Stacks:
    """The sums of a tree's matrices of low rank, as long as their factors are smaller than the matrices."""

    def __init__(self, spec: Mapping[str, TensorSpec]) -> None:
        self._spec = {name: one for name, one in spec.items() if is_low_rank(name)}
        self._addends: dict[str, Addends] = {name: [] for name in self._spec}
        self._ranks = dict.fromkeys(self._spec, 0)
        self._elements = 0  # of all factors

    def take(self, tree: Tree, weight: float) -> dict[str, Addends]:
        """Add a tree's factors; return what is now summed as wholes, by name: from then on, that name is not here."""
        left: dict[str, Addends] = {}
        for name, addends in list(self._addends.items()):
            pair, shape = factors_of(tree, name), self._spec[name].shape
            rank = self._ranks[name] + (0 if pair is None else pair.rank)
            more = 0 if pair is None else pair.rank * sum(shape)
            addends.append((weight, renamed(tree, {name: name})))  # nothing else of the tree is kept
            if pair is None or not are_smaller(rank, shape) or 8 * (self._elements + more) > LARGE_BYTES:
                left[name] = self._addends.pop(name)
                self._elements -= self._ranks.pop(name) * sum(shape)
            else:
                self._ranks[name], self._elements = rank, self._elements + more
        return left

    def names(self) -> frozenset[str]:
        """Return the names of the matrices whose sums are here."""
        return frozenset(self._addends)

    def total(self, name: str, factor: float, dtype: np.dtype[np.generic]) -> Factors:
        """Return the factors of a matrix's sum, times `factor`, in a dtype."""
        rows, columns = self._spec[name].shape
        parts = [Factors(np.zeros((rows, 0), dtype), np.zeros((0, columns), dtype))]
        for weight, tree in self._addends[name]:
            if (pair := factors_of(tree, name)) is not None:
                parts.append(pair.scaled(weight * factor, dtype))
        return stacked(parts)
