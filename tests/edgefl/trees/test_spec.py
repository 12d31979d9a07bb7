"""What is known of a tensor without its values."""

from __future__ import annotations

import numpy as np

from edgefl.trees.spec import BLOCK_ELEMENTS, TensorSpec, bfloat16, blocks, is_float


def test_the_size_of_a_tensor() -> None:
    spec = TensorSpec((3, 4), bfloat16())
    assert (spec.size, spec.num_bytes, str(spec)) == (12, 24, "bfloat16[3, 4]")
    assert TensorSpec((), np.dtype(np.float64)).size == 1
    assert TensorSpec((3, 0), np.dtype(np.float32)).num_bytes == 0


def test_floating_point_and_blocks() -> None:
    assert is_float(bfloat16())
    assert not is_float(np.dtype(np.int32))
    parts = list(blocks(2 * BLOCK_ELEMENTS + 1))
    assert [one.indices(2 * BLOCK_ELEMENTS + 1)[:2] for one in parts] == [
        (0, BLOCK_ELEMENTS), (BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS), (2 * BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS + 1),
    ]  # fmt: skip
