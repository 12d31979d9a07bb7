"""A simulation in a process of its own: what the user's code ends there, others go on from."""

import os
import signal

import numpy as np
import pytest

from edgefl.config import from_dict
from edgefl.errors import ConfigError, MissingExtra, TaskError
from edgefl.simulation.isolation import process
from edgefl.simulation.isolation.at_work import AtWork
from edgefl.simulation.isolation.messages import Chose, Order, Refused, RoundDone, SimulationFinished
from edgefl.simulation.isolation.process import OwnProcess, _error, _Story
from edgefl.simulation.simulate import Watching, simulate
from edgefl.simulation.study.report import ProcessLost
from edgefl.simulation.world.settings import SimulationConfig
from edgefl.testing import make_report

MODULE = """
import dataclasses, os, signal, sys
from pathlib import Path
import numpy as np
import torch
from torch import nn
from edgefl import Task, WholeSet

HERE = Path(__file__).parent

def die(name, times):
    deaths = len(list(HERE.glob(name + "-*")))
    if deaths < times:
        (HERE / f"{name}-{deaths}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

def load(part="0", parts="1", deadly="", times="9"):
    print("loading", part)
    if part == deadly:
        die("load", int(times))
    inputs = np.random.default_rng(int(part)).normal(size=(12, 4)).astype(np.float32)
    return inputs, (inputs.sum(1) > 0).astype(np.int64)

def held_out():
    return load("99")

def accuracy(outputs, targets):
    if (HERE / "end in evaluation").exists() and len(list(HERE.glob("seen-*"))) == 2:
        die("metric", 9)
    (HERE / f"seen-{len(list(HERE.glob('seen-*')))}").touch()
    return 1.0

task = Task(name="deadly", model=lambda: nn.Linear(4, 2), loss=nn.functional.cross_entropy, train_data=load,
            test_data=held_out, metrics={"accuracy": WholeSet(accuracy)})  # once in each evaluation
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deadly_task.py").write_text(MODULE)
    (tmp_path / "pyproject.toml").write_text('[tool.edgefl]\ntask = "deadly_task:task"\n')
    return tmp_path


def order(folder, rounds=2, **fields):
    config = from_dict(SimulationConfig, {"rounds": {"count": rounds}, "population": {"clients": 5}})
    return Order(**{"task": str(folder), "engine": "loop", "config": config} | fields)


def test_one_that_kills_its_process_is_failed_by_name_and_the_next_order_knows_nothing_of_it(folder, tmp_path, capfd):
    with OwnProcess() as process:
        said = []
        watching = Watching(on_engine=lambda *what: said.append(what))
        result = process.simulate(order(folder, data={"deadly": "2"}), watching, tmp_path / "model")
        again = process.simulate(order(folder), Watching())
    assert [(one.admitted, one.failed) for one in result.rounds] == [(4, 1), (4, 1)]
    reason = "task 'deadly': train_data ended its process, which was ended by SIGKILL, 2 times"
    assert all(one.reasons == {"client-2": reason.replace("'deadly'", repr(str(folder)))} for one in result.rounds)
    assert result.engine_reason.endswith("without client-2, whose train_data ended its process")
    assert said[-1] == ("loop", result.engine_reason)
    assert (tmp_path / "model").stat().st_size > 0
    assert result.model["path"] == str(tmp_path / "model")
    assert [one.admitted for one in again.rounds] == [5, 5]
    assert "loading 0" in capfd.readouterr().out


def test_one_that_does_it_once_is_in_it_and_the_model_is_that_of_an_undisturbed_run(folder):
    with OwnProcess(to_stderr=True) as process:
        result = process.simulate(order(folder, rounds=3, data={"deadly": "4", "times": "1"}), Watching())
    undisturbed = simulate(str(folder), engine="loop", config=order(folder, rounds=3).config)
    assert [one.admitted for one in result.rounds] == [5, 5, 5]
    for name, array in undisturbed.parameters.items():
        np.testing.assert_array_equal(result.parameters[name], array)


def test_what_is_no_clients_doing_ends_it_with_the_rounds_that_there_are(folder, tmp_path):
    (folder / "end in evaluation").touch()
    heard = []
    with OwnProcess() as process, pytest.raises(ProcessLost, match=r"evaluation ended its process, .* SIGKILL") as lost:
        process.simulate(order(folder, rounds=9), Watching(on_round=heard.append), tmp_path / "model")
    assert [one.round for one in heard] == [1, 2]
    so_far = lost.value.so_far
    assert [one.round for one in so_far.rounds] == [1, 2]
    assert so_far.interrupted
    assert (tmp_path / "model").stat().st_size > 0


def test_it_goes_on_where_a_checkpoint_was_made(folder, tmp_path):
    kept, config = tmp_path / "kept", order(folder, rounds=2).config
    simulate(str(folder), engine="loop", config=config, checkpoint=kept)
    heard = []

    class Killing(OwnProcess):
        def on_round(self, outcome):
            heard.append(outcome.round)
            if outcome.round == 3:
                os.kill(self._child._process.pid, signal.SIGKILL)

    with Killing() as process:
        result = process.simulate(order(folder, rounds=6, resume=kept), Watching(on_round=process.on_round))
    assert heard == [3, 4, 5, 6]
    assert [one.round for one in result.rounds] == [1, 2, 3, 4, 5, 6]
    undisturbed = simulate(str(folder), engine="loop", config=order(folder, rounds=6).config)
    for name, array in undisturbed.parameters.items():
        np.testing.assert_array_equal(result.parameters[name], array)


def test_an_error_comes_back_as_what_it_was(tmp_path):
    with OwnProcess() as process, pytest.raises(ConfigError, match=r"no pyproject.toml"):
        process.simulate(order(tmp_path), Watching())
    assert isinstance(_error(Refused("TaskError", "what it said")), TaskError)
    error = _error(Refused("MissingExtra", "what it said"))
    assert isinstance(error, MissingExtra)
    assert str(error) == "what it said"
    assert str(_error(Refused("NoSuchError", "what it said"))) == "what it said"


def story(engine="auto"):
    return _Story(order("t", engine=engine), Watching())


def test_a_stack_that_ends_its_process_is_trained_one_by_one_under_auto_and_refused_where_it_was_asked_for():
    at, of_auto, asked = AtWork("stacked training", "client-9"), story(), story("stacked")
    of_auto.handle(Chose("stacked", "measured"))
    of_auto.lost(at, -signal.SIGSEGV, None)
    assert (of_auto.order.engine, of_auto.order.failed) == ("loop", {})
    assert "not in stacks: one's process was ended by SIGSEGV" in of_auto._why()
    asked.lost(at, -signal.SIGSEGV, None)
    assert asked.order.engine == "stacked"
    with pytest.raises(ProcessLost, match="--engine loop trains them one by one"):
        asked.lost(at, -signal.SIGSEGV, None)


def test_a_fault_of_ours_is_not_tried_again_and_one_of_the_machine_is():
    with pytest.raises(ProcessLost, match="the simulation's process ended with status 1"):
        story().lost(AtWork(), 1, None)
    killed = story()
    killed.lost(AtWork(), -signal.SIGKILL, None)
    with pytest.raises(ProcessLost, match="was ended by SIGKILL"):
        killed.lost(AtWork(), -signal.SIGKILL, None)


def test_a_task_whose_every_client_ends_its_process_ends():
    told = story()
    for number in range(process.MAX_DEATHS_A_ROUND - 1):
        told.lost(AtWork("train_data", f"client-{number // 2}"), 3, None)
    assert len(told.order.failed) == (process.MAX_DEATHS_A_ROUND - 1) // 2
    with pytest.raises(ProcessLost, match="64 processes in a row ended with status 3, the last in train_data"):
        told.lost(AtWork("train_data", "client-99"), 3, None)
    told._in_a_row = 63
    told.handle(RoundDone(make_report(), None))
    told.lost(AtWork("train_data", "client-99"), 3, None)  # a round was finished between


def test_peaks_are_of_both_processes(folder):
    result = simulate(str(folder), engine="loop", config=order(folder).config)
    assert story().ended(SimulationFinished(result), None).peak_rss_mb > result.peak_rss_mb
