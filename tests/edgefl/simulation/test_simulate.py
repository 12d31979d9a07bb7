"""`edgefl.simulate`: a task in, rounds and a model out."""

import hashlib
import signal

import numpy as np
import pytest

import edgefl
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError
from edgefl.simulation.simulate import Watching, simulate
from edgefl.simulation.study.report import CutShort
from edgefl.simulation.world.settings import SimulationConfig
from edgefl.task import FitResult, Task, load_task
from edgefl.training.local import initial_parameters
from edgefl.trees import SpooledTree, encoded_bytes


def config(**sections):
    return from_dict(JobConfig, {"train": {"batch_size": 4, "lr": 0.5}} | sections)


def test_it_learns_and_says_what_it_did(tasks, tmp_path):
    heard = []
    watching = Watching(on_engine=lambda *chosen: heard.append(chosen), on_round=heard.append)
    result = edgefl.simulate(
        tasks("task"),
        clients=20,
        rounds=12,
        engine="stacked",
        config=config(),
        out=tmp_path / "model",
        watching=watching,
    )
    assert heard == [("stacked", "it was asked for"), *result.rounds]
    assert [one.round for one in result.rounds] == list(range(1, 13))
    assert result.final["accuracy"] > 0.9
    assert result.final["loss"] < result.rounds[0].metrics["loss"]
    assert result.seconds >= result.round_seconds > 0
    assert result.model["sha256"] == hashlib.sha256((tmp_path / "model").read_bytes()).hexdigest()
    for name, array in SpooledTree(tmp_path / "model").items():
        np.testing.assert_array_equal(array, result.parameters[name])
    assert not result.interrupted


def test_a_task_object_is_as_good_and_the_test_data_may_be_asked_less_often(tasks):
    task = load_task(str(tasks("task")))
    result = simulate(task, clients=4, rounds=5, engine="loop", evaluate_every=2)
    assert ["accuracy" in one.metrics for one in result.rounds] == [False, True, False, True, True]


def test_a_task_without_a_model_has_its_own_fit(tasks):
    result = simulate(tasks("own_fit"), clients=5, rounds=2)
    assert result.parameters["w"].tolist() == [4.0, 4.0]  # twice the mean of 0..4
    assert result.engine == "loop"
    assert "not stacked: it has its own fit" in result.engine_reason


def test_ctrl_c_ends_the_round_and_keeps_what_there_is(tasks):
    def interrupt(outcome):
        if outcome.round == 3:
            signal.raise_signal(signal.SIGINT)

    result = simulate(tasks("task"), clients=4, rounds=100, engine="loop", watching=Watching(on_round=interrupt))
    assert result.interrupted
    assert len(result.rounds) == 3


def test_a_round_left_under_its_quorum_by_ctrl_c_is_dropped(tasks):
    def interrupt(_name, _reason):
        signal.raise_signal(signal.SIGINT)

    result = simulate(tasks("task"), clients=4, engine="loop", watching=Watching(on_engine=interrupt))
    assert (result.interrupted, len(result.rounds), dict(result.final)) == (True, 0, {})


def test_a_round_under_quorum_is_loud(tasks):
    with pytest.raises(CutShort, match="no data"):
        simulate(tasks("task"), clients=1, engine="loop", data={"empty": "0"})


def test_more_than_there_are_is_refused(tasks):
    with pytest.raises(ConfigError, match="more clients than the 4"):
        simulate(tasks("task"), clients=4, config=config(rounds={"clients": 5}))
    with pytest.raises(ConfigError, match="'loop' has no address"):
        simulate(tasks("task"), clients=4, engine="loop", address="auto")
    with pytest.raises(ConfigError, match="has its own clients"):
        simulate(tasks("task"), clients=4, population=lambda _task: None)


@pytest.mark.parametrize("engine", ["loop", "stacked"])
def test_devices_of_the_configuration_live_in_virtual_time(tasks, engine):
    devices = {"speed": {"mean": 1.0}, "delay_s": {"kind": "uniform", "max": 30.0}}
    settings = from_dict(
        SimulationConfig,
        {"rounds": {"count": 3, "clients": 4, "deadline_s": 20.0}, "population": {"clients": 9, "devices": devices}},
    )
    result = simulate(tasks("task"), engine=engine, config=settings)
    ends = [one.virtual_end_s for one in result.rounds]
    assert ends == sorted(ends)
    assert (
        result.as_json()["virtual_seconds"] == ends[-1] == pytest.approx(sum(o.virtual_seconds for o in result.rounds))
    )
    assert result.round_seconds < 10 < ends[-1]


@pytest.mark.parametrize("engine", ["loop", "stacked", "pool"])
def test_only_what_is_trained_moves_and_travels(tasks, engine):
    decaying = config(rounds={"count": 3}, server={"optimizer": "AdamW", "lr": 0.1, "options": {"weight_decay": 0.5}})
    start = initial_parameters(load_task(str(tasks("half"))))
    result = simulate(str(tasks("half")), clients=4, engine=engine, config=decaying, data={"empty": "no"})
    assert np.array_equal(result.parameters["0.weight"], start["0.weight"])
    assert not np.array_equal(result.parameters["0.bias"], start["0.bias"])
    moving = encoded_bytes({name: array for name, array in start.items() if name != "0.weight"})
    frozen = encoded_bytes({"0.weight": start["0.weight"]})
    assert [one.up_bytes for one in result.rounds] == [4 * moving] * 3
    assert [one.down_bytes for one in result.rounds] == [4 * (moving + frozen), 4 * moving, 4 * moving]


def test_a_step_beyond_float32_ends_it_by_name_and_keeps_the_last_good_model(tmp_path):
    def fit(parameters, config, options):
        return FitResult(tree={"w": np.full(2, 3e38, np.float32)}, weight=1.0, metrics={})

    task = Task(name="large", initial=lambda: {"w": np.zeros(2, np.float32)}, fit=fit)
    with pytest.raises(CutShort, match=r"round 2 .*'w' holds NaN or infinity") as short:
        simulate(task, clients=2, rounds=5, engine="loop", out=tmp_path / "model")
    assert [one.round for one in short.value.so_far.rounds] == [1]
    assert SpooledTree(tmp_path / "model")["w"][0] == np.float32(3e38)
