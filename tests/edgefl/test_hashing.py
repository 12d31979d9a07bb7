"""What is written through a hashing file is what arrives, with its hash and its length."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from blake3 import blake3

from edgefl.hashing import HashingFile
from edgefl.trees import write_tree


class Lazy(io.BytesIO):
    """Takes a part of what it is given, as a raw file may."""

    def write(self, data) -> int:
        return super().write(data[:70_001])


@pytest.mark.parametrize("kind", [io.BytesIO, Lazy])
@pytest.mark.parametrize("digest", [hashlib.sha256, blake3])
def test_it_equals_a_plain_file_and_a_hash_of_the_whole(kind, digest) -> None:
    tree = {"w": np.arange(300_000, dtype=np.float64), "scalar": np.float32(3).reshape(())}
    plain, hashed = io.BytesIO(), kind()
    write_tree(tree, plain)
    hashing = HashingFile(hashed, digest())
    write_tree(tree, hashing)
    assert hashed.getvalue() == plain.getvalue()
    assert (hashing.size, hashing.hexdigest()) == (len(plain.getvalue()), digest(plain.getvalue()).hexdigest())
