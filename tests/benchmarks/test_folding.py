"""The fold of files: what it gives, and that blocks make no difference."""

import hashlib

import numpy as np

from benchmarks.folding import bare_add, fold, fold_alone, plain_add, write_model
from edgefl import trees
from edgefl.trees import SpooledTree, write_tree


def test_a_model_is_as_large_as_it_says_and_its_values_come_from_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_model(tmp_path / name, 4_000_000, seed=seed)
    tree = SpooledTree(tmp_path / "a")
    assert trees.tree_bytes(tree) == 4_000_000
    assert list(tree) == ["w0", "w1", "w2", "w3"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    assert np.isfinite(tree["w3"]).all()


def test_the_fold_is_the_rounds_and_the_same_in_a_process_of_its_own(tmp_path):
    write_model(tmp_path / "model", 400_000)
    write_model(tmp_path / "update", 400_000, seed=1)
    updates = [(1.0, tmp_path / "update"), (3.0, tmp_path / "update")]
    seconds, sha256 = fold(tmp_path / "model", updates)
    model, update = SpooledTree(tmp_path / "model"), SpooledTree(tmp_path / "update")
    with (tmp_path / "new").open("wb") as file:
        write_tree({name: model[name] + np.float32(0.5) * update[name] for name in model}, file)
    assert sha256 == hashlib.sha256((tmp_path / "new").read_bytes()).hexdigest()
    alone = fold_alone(tmp_path / "model", updates, 1009)
    assert (alone["sha256"], alone["peak_mb"] > 0, seconds > 0) == (sha256, True, True)
    assert min(bare_add(updates), plain_add(updates)) > 0
