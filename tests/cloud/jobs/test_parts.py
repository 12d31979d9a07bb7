"""The parts of a job that is submitted; see also tests/cloud/state/test_jobs.py."""

from __future__ import annotations

import numpy as np
import pytest

from cloud.jobs.parts import check_fragments, check_parts
from cloud.state.blobs import BlobStore
from edgefl.errors import ConfigError
from edgefl.protocols.messages import BlobRef


def test_parts_that_are_missing_or_do_not_fit(tmp_path):
    blobs = BlobStore(tmp_path)
    bundle, tree = blobs.put(b"zip"), blobs.put_tree({"w": np.zeros(1, np.float32)})
    check_parts(blobs, bundle, tree, None, ["w"])
    with pytest.raises(ConfigError, match=r"frozen part 0000000000000000\.\.\. is not in the cloud"):
        check_parts(blobs, bundle, tree, BlobRef(sha256="0" * 64, size=1), [])
    with pytest.raises(ConfigError, match="buffers b are not among"):
        check_parts(blobs, bundle, tree, None, ["b"])
    with pytest.raises(ConfigError, match="tensors w are both"):
        check_parts(blobs, bundle, tree, tree, [])


def test_more_fragments_than_tensors_are_refused(tmp_path):
    blobs = BlobStore(tmp_path)
    tree = blobs.put_tree({"w": np.zeros(1, np.float32), "v": np.zeros(1, np.float32)})
    check_fragments(blobs, tree, 2)
    with pytest.raises(ConfigError, match=r"server\.fragments=3: the model has 2 tensors"):
        check_fragments(blobs, tree, 3)
