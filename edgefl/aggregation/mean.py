"""The weighted mean of updates: FedAvg's and FedSGD's rule (McMahan et al. 2017, Algorithm 1).

    result = sum_k weight_k * delta_k / sum_k weight_k

Accumulates in float64; tiers of means give the flat mean.
Matrices that come as factors of low rank are summed as products, exactly (`edgefl.aggregation.stacks`).
Integers (such as counters in buffers) are rounded to the nearest; for booleans the weighted majority wins.
Memory: a small model's sums, whatever the cohort's size. Of a large model (`LARGE_BYTES`) a few blocks: updates in
files are only noted and the mean is computed block by block when it is read; other updates are added to sums in a
temporary file. Invariant: each element is summed in the order of arrival, so blocks of any size give the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

import numpy as np

from edgefl.aggregation.stacks import Stacks
from edgefl.errors import StepFailed, UpdateRejected
from edgefl.guards import not_finite_tree, partial_spec, wrong_rank, wrong_spec, wrong_weight
from edgefl.records import Partial, Update
from edgefl.trees import (
    Array,
    BlockTree,
    ComputedTree,
    EncodedTree,
    TensorSpec,
    Tree,
    blocks,
    factors_of,
    is_float,
    is_large,
    read_block,
    spec_of,
)
from edgefl.trees.factors import factor_names
from edgefl.trees.scratch import ScratchTree
from edgefl.trees.views import joined


class WeightedMean:
    """The weighted mean. It streams, and it merges partial sums of regions."""

    streams = True
    merges = True

    def __init__(self, like: Tree) -> None:
        self._spec = spec_of(like)
        self._sums: _Sums = (_LargeSums if is_large(like) else _SmallSums)(self._spec)
        self._stacks = Stacks(self._spec)
        self._weight = 0.0
        self._contributors: list[str] = []

    def add(self, update: Update) -> None:
        """Fold one admitted update. Its weight must be finite and above 0, which the guard ensures.

        The file of a large update must stay until the result was read.
        """
        self._add(update.tree, update.weight)
        self._weight += update.weight
        self._contributors.append(update.device)

    def merge(self, partial: Partial) -> None:
        """Fold a partial sum; raises UpdateRejected if a device is counted twice, or if the tensors do not match."""
        counted = Counter((*self._contributors, *partial.contributors))
        if twice := sorted(name for name, times in counted.items() if times > 1):
            raise UpdateRejected(twice[0], "it is already counted in another partial sum of this round")
        wanted = partial_spec(self._spec, is_mean=partial.is_mean)
        fault = (
            wrong_weight(partial.weight)
            or wrong_spec(spec_of(partial.total), wanted)
            or wrong_rank(partial.total)
            or not_finite_tree(partial.total)
        )
        if fault:
            raise UpdateRejected(", ".join(partial.contributors), f"partial sum: {fault}")
        self._add(partial.total, partial.weight if partial.is_mean else 1.0)
        self._weight += partial.weight
        self._contributors.extend(partial.contributors)

    def partial(self) -> Partial:
        """Return the sum so far, for the next tier; of a large model a tree that is computed when it is read."""
        spec = partial_spec(self._spec, is_mean=False)
        total = self._with_stacks(self._sums.tree(self._whole()), 1.0, spec)
        return Partial(total=total, weight=self._weight, contributors=tuple(self._contributors))

    def partial_mean(self) -> Partial:
        """Return the partial sum as it travels: as a mean in the dtypes of `partial_spec`, half the bytes of the sum.

        This rounds once more, by 6e-8 of an element in float32. Ends the rule, as `result` does.
        """
        spec = partial_spec(self._spec, is_mean=True)

        def mean(name: str, total: Array) -> Array:
            return (total / self._weight).astype(spec[name].dtype)

        tree = self._sums.mapped({name: spec[name] for name in self._whole()}, mean)
        tree = self._with_stacks(tree, 1 / self._weight, spec)
        return Partial(total=tree, weight=self._weight, contributors=tuple(self._contributors), is_mean=True)

    def result(self) -> Tree:
        """Return the mean and end the rule. A large one is computed when it is read.

        Needs at least one update, which the quorum ensures.
        """
        mean = self._sums.mapped({name: self._spec[name] for name in self._whole()}, self._mean)
        return self._with_stacks(mean, 1 / self._weight, self._spec)

    def _add(self, tree: Tree, weight: float) -> None:
        """Add a tree: matrices of low rank as factors as long as that is smaller, all else to the sums."""
        whole = self._whole()
        left = self._stacks.take(tree, weight)
        self._sums.add(tree, weight, whole)
        for name, addends in left.items():
            for own_weight, one in addends:
                self._sums.add(one, own_weight, (name,))

    def _whole(self) -> list[str]:
        """Return the names of what is summed as wholes."""
        stacks = self._stacks.names()
        return [name for name in self._spec if name not in stacks]

    def _with_stacks(self, tree: Tree, factor: float, spec: Mapping[str, TensorSpec]) -> Tree:
        stored: dict[str, Array] = {}
        for name in self._stacks.names():
            pair = self._stacks.total(name, factor, spec[name].dtype)
            stored |= dict(zip(factor_names(name), (pair.left, pair.right), strict=True))
        return joined(tree, EncodedTree(stored)) if stored else tree

    def _mean(self, name: str, total: Array) -> Array:
        """Return a block of the mean from that of the sum."""
        dtype, value = self._spec[name].dtype, total / self._weight
        return value.astype(dtype) if is_float(dtype) else _whole(name, value).astype(dtype)


class _SmallSums:
    """Sums in memory."""

    def __init__(self, spec: dict[str, TensorSpec]) -> None:
        self._spec = spec
        self._totals: dict[str, Array] = {}

    def add(self, tree: Tree, weight: float, names: Collection[str]) -> None:
        factor = np.float64(weight)  # a numpy scalar, so that products are float64
        for name in names:
            total, delta = self._total(name), _wide(tree, name)
            for block in blocks(total.size):
                total[block] += factor * delta[block]

    def tree(self, names: Collection[str]) -> Tree:
        return {name: self._total(name).reshape(self._spec[name].shape) for name in names}

    def _total(self, name: str) -> Array:
        if name not in self._totals:
            self._totals[name] = np.zeros(self._spec[name].size)
        return self._totals[name]

    def mapped(self, spec: dict[str, TensorSpec], function: Callable[[str, Array], Array]) -> Tree:
        """Return a tree with the result of the function for each block; sums are freed one by one."""
        found = {}
        for name, one in spec.items():
            total, whole = self._total(name), np.empty(one.size, one.dtype)
            for block in blocks(total.size):
                whole[block] = function(name, total[block])
            del self._totals[name]
            found[name] = whole.reshape(one.shape)
        return found


class _LargeSums:
    """Sums that are not in memory: of trees in files, and of others in a temporary file."""

    def __init__(self, spec: dict[str, TensorSpec]) -> None:
        self._spec = {name: TensorSpec(one.shape, np.dtype(np.float64)) for name, one in spec.items()}
        self._files: dict[str, list[tuple[np.float64, BlockTree]]] = {name: [] for name in spec}
        self._others: ScratchTree | None = None

    def add(self, tree: Tree, weight: float, names: Collection[str]) -> None:
        factor = np.float64(weight)
        if isinstance(tree, BlockTree) and not _is_in_memory(tree):
            for name in names:
                self._files[name].append((factor, tree))
            return
        self._others = self._others or ScratchTree(self._spec)
        for name in names:
            delta = _signed(tree[name]).reshape(-1)
            for block in blocks(self._spec[name].size):
                self._others.write(name, block, self._others.read(name, block) + factor * delta[block])

    def tree(self, names: Collection[str]) -> BlockTree:
        return ComputedTree({name: self._spec[name] for name in names}, self._read)

    def mapped(self, spec: dict[str, TensorSpec], function: Callable[[str, Array], Array]) -> Tree:
        """Return a tree with the result of the function for each block, whenever it is read."""
        return ComputedTree(spec, lambda name, block: function(name, self._read(name, block)))

    def _read(self, name: str, block: slice) -> Array:
        total = np.zeros(len(range(*block.indices(self._spec[name].size))))
        if self._others is not None:
            total += self._others.read(name, block)
        for factor, tree in self._files[name]:
            pair = factors_of(tree, name)
            total += factor * (_signed(read_block(tree, name, block)) if pair is None else pair.block(block))
        return total


_Sums = _SmallSums | _LargeSums


def _is_in_memory(tree: BlockTree) -> bool:
    """Whether a tree has its tensors in memory, in fewer bits: it is added at once, not kept."""
    return bool(tree.narrow) and not isinstance(tree.stored(), BlockTree)


def _whole(name: str, value: Array) -> Array:
    """Round to the nearest integer; raises StepFailed beyond 64 bits, where the result of a cast is undefined."""
    whole = np.rint(value)
    if not ((whole >= -(2.0**63)) & (whole < 2.0**63)).all():
        raise StepFailed(f"the mean of the updates of tensor {name!r} exceeds 64 bits: {np.abs(whole).max():g}")
    return whole.astype(np.int64)


def _wide(tree: Tree, name: str) -> Array:
    """Return a flattened delta; a product of factors in float64."""
    pair = factors_of(tree, name)
    return (_signed(tree[name]) if pair is None else pair.product()).reshape(-1)


def _signed(delta: Array) -> Array:
    """Convert a wrapped difference of unsigned integers to the signed difference it represents."""
    return delta.view(delta.dtype.str.replace("u", "i")) if delta.dtype.kind == "u" else delta
