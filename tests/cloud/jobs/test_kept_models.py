"""States that are kept to continue from; see also test_control.py and tests/cloud/state/test_jobs.py."""

from __future__ import annotations

import numpy as np
import pytest

from cloud.jobs.kept_models import forget_state, kept_state
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.store import open_database
from edgefl.config import JobConfig
from edgefl.errors import ConfigError
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.records import RoundOutcome


def test_frozen_tensors_and_forgotten_rounds(tmp_path):
    engine, blobs, key = open_database(tmp_path / "cloud.db"), BlobStore(tmp_path / "blobs"), new_fleet_key()
    jobs = Jobs(engine, blobs, lambda bundle: sign(bundle, key))
    moving, frozen = (blobs.put_tree({name: np.zeros(1, np.float32)}) for name in ("w", "f"))
    job = jobs.submit("t:t", blobs.put(b"zip"), moving, (), JobConfig(), parted=True, frozen=frozen)
    with pytest.raises(ConfigError, match="kept are: none"):
        kept_state(engine, blobs, job, 1)
    jobs.open_round(job, 1, ["a"])
    outcome = RoundOutcome(
        job=job, round=1, parameters={}, admitted=("a",), rejected={}, failed={}, missing=(), weight=1.0, metrics={},
        seconds=1.0, up_bytes=0, down_bytes=0,
    )  # fmt: skip
    model = blobs.put_tree({"w": np.ones(1, np.float32)})
    jobs.finish_round(outcome, model, None)
    jobs.end(job, "done", model=blobs.put_tree({"w": np.ones(1, np.float32), "f": np.zeros(1, np.float32)}))
    state = kept_state(engine, blobs, job, 1)
    assert (state.model, state.frozen, state.optimizer_sha256) == (model, frozen, None)
    forget_state(engine, blobs, job, 7)  # never was
    forget_state(engine, blobs, job, 1)
    with pytest.raises(ConfigError, match=r"round 1 of job .* is not kept"):
        kept_state(engine, blobs, job, 1)
    engine.dispose()
