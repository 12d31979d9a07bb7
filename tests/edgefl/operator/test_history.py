"""What a job's JSON says of it, by hand."""

from __future__ import annotations

import dataclasses
import math

from edgefl.config import JobConfig, RoundsConfig, TrainConfig
from edgefl.operator.history import (
    changed_settings,
    compared,
    curves_of,
    headline,
    reasons_of,
    seconds_of,
    settings_of,
)
from edgefl.settings.server import ServerConfig


def round_of(number, metrics, **reasons):
    return {"round": number, "metrics": metrics, "reasons": reasons}


def job_of(*rounds, config=None, **over):
    settings = dataclasses.asdict(config or JobConfig())
    return {
        "id": "job-1", "name": "digits", "state": "done", "created_s": 10.0, "ended_s": 12.5, "rounds": rounds,
        "rounds_done": len(rounds), "config": settings,
    } | over  # fmt: skip


def test_the_curve_of_each_metric_evaluated_ones_first_and_losses_last():
    job = job_of(
        round_of(1, {"train_loss": 2.0}),
        round_of(2, {"train_loss": 1.0, "devices/r2": 0.25, "loss": 4.0, "r2": 0.5}),
        round_of(4, {"train_loss": None, "loss": 3.0, "r2": 0.75}),
    )
    curves = curves_of(job)
    assert [curve.name for curve in curves] == ["r2", "devices/r2", "loss", "train_loss"]
    assert (curves[0].rounds, curves[0].values) == ((2, 4), (0.5, 0.75))
    training = curves[-1]
    assert (training.first, training.lowest, training.highest) == (2.0, 1.0, 2.0)
    assert math.isnan(training.last)
    assert curves[2].as_json() == {
        "rounds": [2, 4], "values": [4.0, 3.0], "first": 4.0, "last": 3.0, "lowest": 3.0, "highest": 4.0,
    }  # fmt: skip
    assert curves_of(job_of()) == []


def test_one_metric_stands_for_a_round():
    assert headline({"train_loss": 1.0, "loss": 2.0, "f1": 0.5}) == ("f1", 0.5)
    assert headline({"train_loss": 1.0, "devices/loss": 2.0, "devices/f1": None}) == ("devices/f1", None)
    assert headline({"train_loss": 1.0, "loss": 2.0}) == ("loss", 2.0)
    assert headline({}) is None


def test_each_reason_is_told_once_with_its_count():
    job = job_of(
        round_of(1, {}, a="NaN", b="late"), round_of(2, {}, a="NaN"), round_of(3, {}, c="NaN"),
    )  # fmt: skip
    assert reasons_of(job) == [
        {"reason": "NaN", "count": 3, "devices": ["a", "c"], "last_round": 3},
        {"reason": "late", "count": 1, "devices": ["b"], "last_round": 1},
    ]


def test_settings_by_their_keys_and_those_that_are_not_the_defaults():
    job = job_of(config=JobConfig(server=ServerConfig(options={"momentum": 0.9}), train=TrainConfig(lr=0.5, round=3)))
    assert settings_of(job)["rounds.count"] == 10
    assert "train.round" not in settings_of(job)
    assert changed_settings(job) == {"server.options.momentum": 0.9, "train.lr": 0.5}
    job["config"]["train"]["unheard_of"] = 1  # by a newer edgefl
    assert changed_settings(job)["train.unheard_of"] == 1
    assert (changed_settings(job_of()), settings_of({"kind": "relay"})) == ({}, {})


def test_jobs_are_compared_value_by_value():
    first = job_of(round_of(1, {"loss": 2.0}), label="a")
    second = job_of(
        round_of(1, {"loss": 1.0, "f1": 0.5}), id="job-2", ended_s=None, config=JobConfig(rounds=RoundsConfig(count=3))
    )
    result = compared([first, second])
    assert result["jobs"] == [{"id": "job-1", "label": "a"}, {"id": "job-2", "label": None}]
    assert result["settings"] == {"rounds.count": [10, 3]}
    assert result["facts"]["seconds"] == [2.5, None]
    assert [None if one is None else one["last"] for one in result["metrics"]["f1"]] == [None, 0.5]
    assert list(result["metrics"]) == ["f1", "loss"]
    assert seconds_of(first) == 2.5
