"""A tree that two processes see."""

import subprocess
import sys

import numpy as np

from edgefl.simulation.engines.shared import SharedTree
from edgefl.trees import spec_of

TREE = {"a": np.arange(3, dtype=np.float32), "b": np.array(True), "c": np.zeros((0, 2)), "d": np.arange(5)}


def test_a_tree_written_here_is_read_at_the_other_mapping():
    here = SharedTree(spec_of(TREE))
    there = SharedTree(spec_of(TREE), here.descriptor)
    here.write(TREE)
    for name, array in TREE.items():
        np.testing.assert_array_equal(there.tree[name], array)
        assert there.tree[name].dtype == array.dtype
    here.close()
    assert there.tree["d"].tolist() == [0, 1, 2, 3, 4]  # the memory lives as long as an array on it


def test_another_process_writes_into_it():
    shared = SharedTree(spec_of({"a": np.zeros(4)}))
    script = (
        "import sys, numpy as np; from edgefl.trees import spec_of;"
        "from edgefl.simulation.engines.shared import SharedTree;"
        "SharedTree(spec_of({'a': np.zeros(4)}), int(sys.argv[1])).write({'a': np.arange(4)})"
    )
    command = [sys.executable, "-c", script, str(shared.descriptor)]
    subprocess.run(command, pass_fds=(shared.descriptor,), timeout=60, check=True)
    assert shared.tree["a"].tolist() == [0, 1, 2, 3]
    shared.close()
