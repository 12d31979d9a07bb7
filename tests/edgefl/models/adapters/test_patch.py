"""A patch makes the new file of the base's, byte for byte; a patch or a base that does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgefl.errors import ConfigError, ProtocolError
from edgefl.models.adapters.patch import Move, apply_patch, make_patch
from edgefl.trees import Array, EncodedTree, Factors, SpooledTree, Tree, encoded, write_tree

ROWS, COLUMNS, RANK = 40, 30, 3


class Files:
    """A base with two weights, the second stored turned and at an odd offset, and the same with adapters in them."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.folder = folder
        self.weights = [rng.normal(size=(ROWS, COLUMNS)).astype(np.float32) for _ in range(2)]
        self.pairs = [
            Factors(
                rng.normal(size=(ROWS, RANK)).astype(np.float32), rng.normal(size=(RANK, COLUMNS)).astype(np.float32)
            )
            for _ in range(2)
        ]
        self.base, self.new, self.target = (folder / name for name in ("base", "new", "target"))
        self.base.write_bytes(self._file(self.weights, b"head of base"))
        moved = [one + pair.product().astype(np.float32) for one, pair in zip(self.weights, self.pairs, strict=True)]
        moved[0][3, 4] = np.nextafter(moved[0][3, 4], np.float32(9))  # another machine rounds otherwise
        self.new.write_bytes(self._file(moved, b"HEAD of new!"))

    def _file(self, weights: list[Array], head: bytes) -> bytes:
        return b"graph" + weights[0].tobytes() + head + np.ascontiguousarray(weights[1].T).tobytes() + b"end"

    def moves(self) -> list[Move]:
        return [Move(f"w{n}", self.weights[n], self.pairs[n]) for n in range(2)]

    def written(self, patch: Tree) -> SpooledTree:
        path = self.folder / "patch"
        with path.open("wb") as file:
            write_tree(patch, file)
        return SpooledTree(path)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_the_result_is_the_new_file_and_the_patch_is_small(files: Files) -> None:
    patch = files.written(make_patch(files.base, files.new, files.moves()))
    apply_patch(files.base, patch, files.target)
    assert files.target.read_bytes() == files.new.read_bytes()
    assert (files.folder / "patch").stat().st_size < files.new.stat().st_size / 2
    assert set(patch.factored) == {"0@lora", "1@lora"}


def test_without_matrices_all_that_differs_is_replaced(files: Files) -> None:
    apply_patch(files.base, files.written(make_patch(files.base, files.new, [])), files.target)
    assert files.target.read_bytes() == files.new.read_bytes()
    same = make_patch(files.base, files.base, [])
    assert same["runs"].shape == (0, 2)


def test_of_two_equal_weights_the_right_one_is_moved(tmp_path: Path) -> None:
    files = Files(tmp_path)
    twin = files.weights[0].tobytes()
    files.base.write_bytes(twin + files.base.read_bytes())
    files.new.write_bytes(twin + files.new.read_bytes())
    patch = make_patch(files.base, files.new, files.moves())
    assert patch["places"][0].tolist() == [len(twin) + 5, ROWS, COLUMNS]
    apply_patch(files.base, patch, files.target)
    assert files.target.read_bytes() == files.new.read_bytes()


def test_another_base_is_refused(files: Files, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Files(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="does not hold the weight 'w0' of these parameters, so it is another base"):
        make_patch(other.base, files.new, files.moves())
    files.new.write_bytes(b"longer" + files.new.read_bytes())
    with pytest.raises(ConfigError, match="they are not the same graph with other weights"):
        make_patch(files.base, files.new, files.moves())


def spoilt(patch: Tree, **changes: Array) -> Tree:
    return EncodedTree({**encoded(patch), **changes})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"places": np.array([[-4, ROWS, COLUMNS], [9, COLUMNS, ROWS]])}, "matrix 0 of a patch is not within its file"),
        ({"places": np.array([[10**12, ROWS, COLUMNS], [9, COLUMNS, ROWS]])}, "matrix 0 of a patch is not within"),
        ({"places": np.array([[5, ROWS, ROWS], [9, COLUMNS, ROWS]])}, "matrix 0 of a patch .* of another shape"),
        ({"places": np.array([[5, ROWS, COLUMNS]])}, "a patch has 1 places and other than as many matrices"),
        ({"places": np.zeros(3)}, "a patch has no table 'places' of 3 columns"),
        ({"runs": np.array([[0, 10**9]])}, "a patch has other bytes than its runs say"),
        ({"runs": np.array([[10**9, 1]]), "bytes": np.zeros(1, np.uint8)}, "a patch replaces 1 bytes at 1000000000"),
        ({"runs": np.array([[0, 0]]), "bytes": np.zeros(0, np.uint8)}, "a patch replaces 0 bytes"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(files: Files, changes: dict[str, Array], fault: str) -> None:
    patch = spoilt(make_patch(files.base, files.new, files.moves()), **changes)
    with pytest.raises(ProtocolError, match=fault):
        apply_patch(files.base, patch, files.target)
