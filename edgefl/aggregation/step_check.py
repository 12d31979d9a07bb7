"""After the step: parameters that cannot be gone on with end the round, and those before it stay the job's.

Guards admit finite updates of the right dtype, but sums of them may leave what a dtype holds: 3e38 and 3e38 are
infinity in float32, and an integer wraps around without a word.
"""

from __future__ import annotations

import numpy as np

from edgefl.errors import StepFailed
from edgefl.guards import not_finite_tree
from edgefl.records import Plan
from edgefl.trees import Array, Tree, blocks


def integer_moves(mean: Tree) -> dict[str, Array]:
    """Return what moves integers; the step uses up the rest of the mean."""
    return {name: array for name, array in mean.items() if array.dtype.kind in "iu"}


def refuse_unsound(plan: Plan, moves: Tree, new: Tree, of_optimizer: str | None = None) -> None:
    """Raise StepFailed for new parameters, or an optimizer's state, beyond what their dtypes hold.

    `moves` are those of `integer_moves`; `of_optimizer` is what its optimizer says of itself.
    """
    fault = not_finite_tree(new) or _wrapped(plan.parameters, moves, new) or of_optimizer
    if fault:
        raise StepFailed(
            f"round {plan.round} of job {plan.job}: after the step, {fault}. The parameters before this round stay; "
            "a smaller learning rate or smaller updates keep within the range"
        )


def _wrapped(old: Tree, moves: Tree, new: Tree) -> str | None:
    """Say which integer tensor left the range of its dtype, if one did."""
    for name, move in moves.items():
        before, by, after = (tree.reshape(-1) for tree in (old[name], move, new[name]))
        for block in blocks(after.size):
            left = _left_range(before[block], by[block], after[block])
            if left.any():
                at = int(np.argmax(left))
                return (
                    f"tensor {name!r} is beyond the range of {after.dtype.name}: "
                    f"{before[block][at]} moved by {_signed(by)[block][at]}"
                )
    return None


def _left_range(before: Array, by: Array, after: Array) -> Array:
    if after.dtype.kind == "u":
        return np.asarray(np.where(_signed(by) >= 0, after < before, after > before))
    return np.asarray(((before ^ after) & (by ^ after)) < 0)  # both differ in sign from the sum


def _signed(move: Array) -> Array:
    """Read a wrapped difference of unsigned integers as the signed one that it stands for."""
    return move.view(move.dtype.str.replace("u", "i")) if move.dtype.kind == "u" else move
