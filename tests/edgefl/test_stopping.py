"""Early stop: at a value, or without an improvement."""

from __future__ import annotations

import math

import pytest

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.choosing.settings import StopConfig
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError
from edgefl.rounds import Job, run_rounds
from edgefl.settings.server import ServerConfig
from edgefl.stopping import make_stop
from edgefl.testing import ScriptedFleet, make_update


def stop_of(values, **settings):
    stop = make_stop(StopConfig(**{"metric": "accuracy"} | settings))
    for number, value in enumerate(values, 1):
        stop.note(number, {"accuracy": value, "loss": value, "other": 9.0})
    return stop.reason()


@pytest.mark.parametrize(
    ("values", "settings", "reason"),
    [
        ([0.5, 0.9], {"at": 0.95}, ""),
        ([0.5, 0.96], {"at": 0.95}, "accuracy is 0.96 after round 2, which reaches rounds.stop.at=0.95"),
        ([2.0, 0.4], {"metric": "loss", "at": 0.5}, "loss is 0.4 after round 2, which reaches rounds.stop.at=0.5"),
        ([0.5, 0.6, 0.6], {"patience": 2}, ""),
        ([0.5, 0.6, 0.6, 0.6], {"patience": 2}, "accuracy has not improved since round 2 (0.6); it is round 4"),
        ([0.5, 0.52, 0.54, 0.56], {"patience": 2, "min_change": 0.1},
         "accuracy has not improved since round 1 (0.5); it is round 4"),
        ([0.5, 0.4, 0.3], {"patience": 1, "direction": "min"}, ""),
        ([math.nan, None, 0.5], {"at": 0.5}, "accuracy is 0.5 after round 3, which reaches rounds.stop.at=0.5"),
        ([], {"patience": 1}, ""),
    ],
)  # fmt: skip
def test_when_a_job_stops(values, settings, reason):
    assert stop_of(values, **settings) == reason


def test_without_a_metric_there_is_no_stop_and_half_a_condition_is_refused():
    assert make_stop(StopConfig()) is None
    with pytest.raises(ConfigError, match=r"no condition: add rounds\.stop\.at or rounds\.stop\.patience"):
        StopConfig(metric="accuracy")
    with pytest.raises(ConfigError, match="has no metric"):
        StopConfig(at=0.5)
    with pytest.raises(ConfigError, match=r"Add rounds\.stop\.direction"):
        make_stop(StopConfig(metric="goodness", at=1.0))


def test_rounds_end_there():
    settings = from_dict(JobConfig, {"rounds": {"count": 9, "stop": {"metric": "train_loss", "at": 3}}})

    def client(plan):
        return make_update("a", round=plan.round, metrics={"train_loss": 6.0 - plan.round}, w=[1.0])

    step = ServerOptimizer(ServerConfig(), gradient=False)
    job = Job(id="job", config=settings, step=step, stop=make_stop(settings.rounds.stop))
    start = make_update("a", w=[0.0]).tree
    assert [one.round for one in run_rounds(job, ScriptedFleet({"a": client}), start)] == [1, 2, 3]
