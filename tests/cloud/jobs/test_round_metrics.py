"""Evaluated metrics beside a round's own; see also tests/cloud/state/test_jobs.py."""

from __future__ import annotations

import pytest

from cloud.jobs.round_metrics import MAX_EVALUATED, round_json, store_metrics
from cloud.state.store import open_database, rounds
from edgefl.errors import ConfigError


def test_metrics_are_added_and_bounded(tmp_path):
    engine = open_database(tmp_path / "cloud.db")
    with engine.begin() as db:
        db.execute(rounds.insert().values(job="j", round=1, cohort=[], outcome={"metrics": {"train_loss": 1.0}}))
    assert store_metrics(engine, "j", 1, {"accuracy": 0.5})
    assert store_metrics(engine, "j", 1, {"accuracy": 0.6, "loss": None})
    assert not store_metrics(engine, "j", 2, {"accuracy": 0.5})
    with engine.begin() as db:
        row = db.execute(rounds.select()).mappings().one()
    assert round_json(row)["metrics"] == {"train_loss": 1.0, "accuracy": 0.6, "loss": None}
    with pytest.raises(ConfigError, match=f"at most {MAX_EVALUATED} are kept"):
        store_metrics(engine, "j", 1, {f"m{at}": 0.0 for at in range(MAX_EVALUATED)})
    engine.dispose()
