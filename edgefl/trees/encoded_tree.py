"""Trees whose tensors are stored in another form: matrices as two factors, or numbers in fewer bits.

Which form a tensor has is said by the names under which it is stored (`factors`, `narrow`). Users of a tree see the
tensor itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgefl.settings.server import EXACT
from edgefl.trees.block_tree import LARGE_BYTES, BlockTree, encoded, read_block, spec_of
from edgefl.trees.factors import Factors, factor_names, factor_owner, pair_spec
from edgefl.trees.narrow import narrow_name, narrow_parts, narrow_spec, narrowed, widened
from edgefl.trees.spec import Array, TensorSpec, Tree


class EncodedTree(BlockTree):
    """A tree made of what is stored; raises ProtocolError for parts that do not make a tensor."""

    def __init__(self, stored: Tree) -> None:
        self._stored = stored
        known = spec_of(stored)
        super().__init__(whole_spec(known))
        others = self.spec.keys() - known.keys()
        self._narrow_parts = {name: parts for name in others if (parts := narrow_parts(name, known))}
        self.narrow = frozenset(self._narrow_parts)
        self.factored = frozenset(others - self.narrow)
        size = sum(one.num_bytes for one in self.spec.values()) if self.narrow else 0
        self.reads_blocks = size > LARGE_BYTES or (isinstance(stored, BlockTree) and stored.reads_blocks)

    def __getitem__(self, name: str) -> Array:
        pair = self.factors(name)
        if pair is not None:
            return pair.product().astype(self.spec[name].dtype)
        return super().__getitem__(name) if name in self.narrow else self._stored[name]

    def read(self, name: str, block: slice) -> Array:
        pair = self.factors(name)
        if pair is not None:
            return pair.block(block).astype(self.spec[name].dtype)
        if parts := self._narrow_parts.get(name):
            return widened(parts, self._stored, block)
        part = read_block(self._stored, name, block)
        return part if isinstance(self._stored, BlockTree) else np.array(part)

    def factors(self, name: str) -> Factors | None:
        if name not in self.factored:
            return None
        return Factors(*(self._stored[side] for side in factor_names(name)))

    def stored(self) -> Tree:
        return self._stored

    def stored_names(self, name: str) -> tuple[str, ...]:
        return factor_names(name) if name in self.factored else self._narrow_parts.get(name, (name,))


def in_form(tree: Tree, form: str, seed: int = 0) -> Tree:
    """Return a tree with its float32 tensors in fewer bits (`edgefl.trees.narrow`); `exact` = as it is.

    Those that are in fewer bits already stay so. The same tree, form and seed give the same bits.
    """
    if form == EXACT:
        return tree
    stored = encoded(tree)
    return EncodedTree(narrowed(stored, spec_of(stored), form, seed))


def whole_spec(stored: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the spec of a tree's tensors from that of its stored ones; raises ProtocolError for what is no tensor."""
    found: dict[str, TensorSpec] = {}
    for name, one in stored.items():
        if (matrix := factor_owner(name)) is not None:
            found[matrix] = pair_spec(matrix, stored)
        elif (whole := narrow_name(name)) is not None:
            found[whole] = narrow_spec(whole, stored)
        else:
            found[name] = one
    return found
