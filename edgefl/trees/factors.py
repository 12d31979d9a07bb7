"""Low-rank tensors: matrices that a tree has as two factors, as LoRA trains them (Hu et al. 2021).

A tensor D (N, M) whose name ends with `@lora` is stored in one of two forms: whole, or as its factors B (N, R), named
`..@lora_B`, and A (R, M), named `..@lora_A`, with D = B A. Users of a tree see D; only its bytes, and those who add
products (`edgefl.aggregation.stacks`), see the factors. R = 0 is a matrix of zeros, in no bytes.
D is float64 if a factor is, otherwise float32, also of factors in 16 bits. Products are computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.trees.spec import Array, TensorSpec, is_float

MARK = "@lora"  # ends the name of a matrix that may be stored as factors; no state dict of torch has it
_B, _A = "_B", "_A"


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a matrix (N, M) of rank R at most."""

    left: Array  # B, (N, R)
    right: Array  # A, (R, M)

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.left.shape[0]), int(self.right.shape[1])

    def product(self) -> Array:
        """Return B A, (N, M), in float64."""
        return np.asarray(self.left.astype(np.float64) @ self.right.astype(np.float64))

    def block(self, block: slice) -> Array:
        """Return these elements of the flattened product, in float64."""
        rows, columns = self.shape
        start, stop, _ = block.indices(rows * columns)
        first, last = start // max(columns, 1), -(-stop // max(columns, 1))
        part = self.left[first:last].astype(np.float64) @ self.right.astype(np.float64)
        return np.asarray(part.reshape(-1)[start - first * columns : stop - first * columns])

    def scaled(self, factor: float, dtype: np.dtype[np.generic]) -> Factors:
        """Return the factors of `factor` times the matrix, in another dtype; B is scaled in float64."""
        return Factors((self.left.astype(np.float64) * factor).astype(dtype), self.right.astype(dtype))


def stacked(several: list[Factors]) -> Factors:
    """Return the factors of a sum of products: B's side by side, A's one below the other (FLoRA, arXiv 2409.05976)."""
    return Factors(np.hstack([one.left for one in several]), np.vstack([one.right for one in several]))


def is_low_rank(name: str) -> bool:
    """Whether a tensor may be stored as factors, by its name."""
    return name.endswith(MARK)


def factor_names(name: str) -> tuple[str, str]:
    """Return the names under which the factors B and A of a tensor are stored."""
    return name + _B, name + _A


def are_smaller(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether factors of this rank have fewer elements than the matrix."""
    rows, columns = shape
    return rank * (rows + columns) < rows * columns


def product_dtype(left: np.dtype[np.generic], right: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """Return the dtype of the matrix that has factors of these dtypes."""
    return np.dtype(np.float64 if max(left.itemsize, right.itemsize) == 8 else np.float32)


def factor_owner(stored: str) -> str | None:
    """Return the name of the matrix of which this is a stored factor; None for any other tensor."""
    whole = stored[: -len(_A)]
    return whole if stored[-len(_A) :] in {_A, _B} and is_low_rank(whole) else None


def is_factor(stored: str) -> bool:
    """Whether this is the name of a stored factor."""
    return factor_owner(stored) is not None


def pair_spec(whole: str, stored: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return the spec of a matrix from those of its stored factors; raises ProtocolError for no pair of factors."""
    pair = [stored.get(side) for side in factor_names(whole)]
    if whole in stored or any(side is None for side in pair):
        there = "both whole and as a factor" if whole in stored else "as one factor only"
        raise ProtocolError(
            f"tensor {whole!r} is there {there}; expected {whole}{_B} and {whole}{_A}, or {whole} alone"
        )
    return _product_spec(whole, *(side for side in pair if side is not None))


def _product_spec(name: str, left: TensorSpec, right: TensorSpec) -> TensorSpec:
    if not (is_float(left.dtype) and is_float(right.dtype)):
        raise ProtocolError(f"the factors of tensor {name!r} are {left} and {right}; expected floating point")
    if len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
        raise ProtocolError(
            f"the factors of tensor {name!r} are {left} and {right}; expected (rows, rank) and (rank, columns) of one "
            "rank"
        )
    return TensorSpec((left.shape[0], right.shape[1]), product_dtype(left.dtype, right.dtype))
