"""Histories in the database: written with the round, and taken over by the next job of the same task."""

from __future__ import annotations

import numpy as np

from cloud.jobs.participations import load_history
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.store import open_database
from edgefl.choosing.history import UNKNOWN, Participation
from edgefl.config import JobConfig
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.records import RoundOutcome


def test_a_round_is_kept_and_known_to_the_tasks_next_job(tmp_path):
    engine, blobs, key = open_database(tmp_path / "cloud.db"), BlobStore(tmp_path / "blobs"), new_fleet_key()
    jobs = Jobs(engine, blobs, lambda bundle: sign(bundle, key))

    def submit(task):
        return jobs.submit(task, blobs.put(b"zip"), blobs.put_tree({"w": np.zeros(1, np.float32)}), (), JobConfig())

    job = submit("t:t")
    seen = Participation(samples=7.0, loss=0.5, duration_s=3.0, rounds=1, asked=1, last_round=1)
    for number, learnt in ((1, {"a": seen, "b": UNKNOWN}), (2, {"b": Participation(failures=2)})):
        jobs.open_round(job, number, ["a"])
        outcome = RoundOutcome(
            job=job, round=number, parameters={}, admitted=("a",), rejected={}, failed={}, missing=(), weight=1.0,
            metrics={}, seconds=1.0, up_bytes=0, down_bytes=0,
        )  # fmt: skip
        jobs.finish_round(outcome, blobs.put_tree({"w": np.ones(1, np.float32)}), None, learnt=learnt)
    assert load_history(engine, job).of("a") == seen
    assert load_history(engine, job).of("b") == Participation(failures=2)
    assert load_history(engine, submit("t:t")).of("a") == Participation(samples=7.0, duration_s=3.0)
    assert load_history(engine, submit("other:t")).of("a") == UNKNOWN
    engine.dispose()
