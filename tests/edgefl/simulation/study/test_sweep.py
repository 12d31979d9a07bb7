"""`edgefl.sweep`: variants one after another, compared."""

import signal
import sys

import pytest

import edgefl
from edgefl.errors import ConfigError, MissingExtra
from edgefl.simulation.simulate import simulate
from edgefl.simulation.study.sweep import SweepWatching, sweep
from edgefl.task import load_task


def test_each_variant_is_the_simulation_with_its_settings(tasks):
    heard = []
    watching = SweepWatching(
        on_begin=lambda variant: heard.append(variant.name), on_round=lambda _variant, outcome: heard.append(outcome),
        on_end=heard.append,
    )  # fmt: skip
    over = {"train.lr": [0.1, 0.5], "rounds.count": [1, 2]}
    result = edgefl.sweep(tasks("task"), over, clients=4, engine="loop", watching=watching)
    assert [dict(one.variant.settings) for one in result.variants] == [
        {"train.lr": lr, "rounds.count": count} for lr in (0.1, 0.5) for count in (1, 2)
    ]
    last = result.variants[-1]
    assert heard[-4:] == ["train.lr=0.5, rounds.count=2", *last.rounds, last]
    alone = simulate(tasks("task"), clients=4, engine="loop", config=edgefl.JobConfig(
        rounds=edgefl.JobConfig().rounds.__class__(count=2), train=edgefl.JobConfig().train.__class__(lr=0.5),
    ))  # fmt: skip
    assert last.result.model == alone.model
    assert not result.failed
    assert not result.interrupted


def test_the_result_is_a_json_a_frame_and_a_figure(tasks):
    result = sweep(tasks("task"), {"train.lr": [0.1, 0.5]}, clients=3, rounds=2, engine="loop")
    said = result.as_json()["variants"]
    assert [(one["name"], one["settings"], one["engine"]) for one in said] == [
        ("train.lr=0.1", {"train.lr": 0.1}, "loop"), ("train.lr=0.5", {"train.lr": 0.5}, "loop"),
    ]  # fmt: skip
    frame = result.to_frame()
    assert frame["train.lr"].tolist() == [0.1, 0.1, 0.5, 0.5]
    assert frame["round"].tolist() == [1, 2, 1, 2]
    assert len(result.figure().axes[0].lines) == 2


def test_a_variant_that_fails_is_told_and_the_others_go_on(tasks):
    result = sweep(tasks("task"), {"rounds.quorum": [3, 4]}, clients=4, rounds=2, engine="loop", data={"empty": "1"})
    good, bad = result.variants
    assert (good.error, len(good.rounds)) == (None, 2)
    assert "the quorum is 4" in bad.error
    assert result.failed == [bad]
    assert result.as_json()["variants"][1]["error"] == bad.error


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"train.lr": [0.1, -1]}, "train.lr=-1"),
        ({"train.speed": [1]}, "unknown configuration key 'train.speed'"),
        ({"nothing.at.all": [1]}, "no section 'nothing'"),
        ({"aggregation.rule": ["mean", "meen"]}, "'meen' is not one of"),
        ({"server.optimizer": ["SGD", "Adams"]}, "'Adams' is not an optimizer"),
        ({"rounds.clients": [2, 5]}, "more clients than the 4"),
        ({"population.clients": [9, 1], "rounds.clients": [2]}, "more clients than the 1"),
    ],
)
def test_a_bad_value_is_refused_before_the_first_variant(tasks, over, reason):
    begun = []
    with pytest.raises(ConfigError, match=reason):
        sweep(tasks("task"), over, clients=4, watching=SweepWatching(on_begin=begun.append))
    assert begun == []


def test_an_unknown_engine_and_a_task_object(tasks):
    with pytest.raises(ConfigError, match="engine 'warp' is not one of"):
        sweep(tasks("task"), {"train.lr": [0.1]}, engine="warp")
    result = sweep(load_task(str(tasks("task"))), {"train.lr": [0.1]}, clients=2, rounds=1, engine="loop")
    assert len(result.variants[0].rounds) == 1


def test_ctrl_c_ends_the_variant_and_begins_no_other(tasks):
    watching = SweepWatching(on_round=lambda _variant, _outcome: signal.raise_signal(signal.SIGINT))
    result = sweep(tasks("task"), {"train.lr": [0.1, 0.5]}, clients=2, rounds=9, engine="loop", watching=watching)
    assert result.interrupted
    assert [len(one.rounds) for one in result.variants] == [1]


def test_a_second_ctrl_c_keeps_the_rounds_too(tasks):
    def twice(_variant, outcome):
        if outcome.round == 2:
            raise KeyboardInterrupt

    result = sweep(
        tasks("task"), {"train.lr": [0.1, 0.5]}, clients=2, rounds=9, engine="loop",
        watching=SweepWatching(on_round=twice),
    )  # fmt: skip
    assert (result.interrupted, len(result.variants[0].rounds), result.variants[0].error) == (True, 2, "interrupted")


def test_without_pandas_the_extra_is_named(tasks, monkeypatch):
    result = sweep(tasks("task"), {"train.lr": [0.1]}, clients=2, rounds=1, engine="loop")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="sim"):
        result.to_frame()
