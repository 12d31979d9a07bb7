"""What may be wrong with what a person asks for, through the command itself: one line that says what to do."""

import json
import sys

import pytest

from edgefl.app import cli

ODD_LOSSES = """
import dataclasses

import torch
from torch import nn
from small_tasks import task

each = dataclasses.replace(task, loss=lambda outputs, targets: nn.functional.cross_entropy(
    outputs, targets, reduction="none"))
total = dataclasses.replace(task, loss=lambda outputs, targets: nn.functional.cross_entropy(
    outputs, targets, reduction="sum"))
"""


@pytest.fixture
def edgefl(monkeypatch, capfd):
    """Run `edgefl simulate ...` as its entry point does; return its exit status, stdout and stderr."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["edgefl", "simulate", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        return status, out, err

    return command


def refused(answer, status, *said):
    assert answer[0] == status, answer
    for words in said:
        assert words in answer[2]
    assert "Traceback" not in answer[2]


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--clients", "0"], 2, ["'--clients': 0 is not in the range x>=1"]),
        (["--engine", "warp"], 2, ["'warp' is not one of", "auto", "loop", "stacked", "pool"]),
        (["--clients", "4", "--set", "rounds.clients=9"], 1, ["rounds.clients=9", "the 4 of this simulation"]),
        (["--set", "train.speed=9"], 1, ["unknown configuration key 'train.speed'", "lr"]),
        (["--set", "train.lr=-1"], 1, ["train.lr=-1.0 must be above 0"]),
        (["--set", "population.clients=-3"], 1, ["population.clients=-3 must be 0 or more"]),
        (["--sweep", "train.lr=0.1,fast"], 1, ["train.lr='fast' must be of type float"]),
        (["--clients", "4", "--sweep", "rounds.clients=2,9"], 1, ["rounds.clients=9", "the 4 of this simulation"]),
        (["--resume", "/nowhere/at/all"], 1, ["/nowhere/at/all has no checkpoint"]),
        (["--config", "/nowhere.toml"], 1, ["cannot read the configuration /nowhere.toml"]),
        (["--plot", "/nowhere/a.png"], 1, ["--plot /nowhere/a.png: there is no folder /nowhere"]),
    ],
)
def test_flags_and_settings(edgefl, tasks, flags, status, said):
    refused(edgefl(tasks("task"), *flags), status, *said)


def test_a_folder_that_is_not_there(edgefl, tmp_path):
    refused(edgefl(tmp_path / "no-such-task"), 1, str(tmp_path / "no-such-task"))
    refused(edgefl("no_such_module:task"), 1, "no_such_module")


def test_a_trace_with_a_bad_line(edgefl, tasks, tmp_path):
    trace = tmp_path / "phones.csv"
    trace.write_text("speed,uplink_mbps\n100,5\n100,fast\n")
    answer = edgefl(tasks("task"), "--set", f"population.devices.trace={trace}", "--engine", "loop")
    refused(answer, 1, f"{trace}:3: uplink_mbps='fast'; expected a finite number, above 0")


def test_a_client_without_data_fails_and_the_others_go_on(edgefl, tasks, tmp_path):
    flags = [tasks("task"), "--clients", "4", "--rounds", "2", "--engine", "loop", "--data", "empty=2"]
    status, out, _ = edgefl(*flags, "--json", tmp_path / "a.json")
    assert status == 0
    assert "round 2/2: 3 admitted, 1 failed" in out
    assert "client-2: " in out
    rounds = json.loads((tmp_path / "a.json").read_text())["rounds"]
    assert [(one["admitted"], one["failed"]) for one in rounds] == [(3, 1), (3, 1)]
    refused(edgefl(*flags, "--set", "rounds.quorum=4"), 1, "3 of 4 updates admitted, the quorum is 4", "client-2: ")


@pytest.fixture
def odd(tasks, tmp_path):
    """Give a folder of a task whose loss is odd."""

    def make(name):
        (tmp_path / "small_tasks.py").write_text((tasks("task") / "small_tasks.py").read_text())
        (tmp_path / f"odd_{name}.py").write_text(ODD_LOSSES)
        (tmp_path / "pyproject.toml").write_text(f'[tool.edgefl]\ntask = "odd_{name}:{name}"\n')
        return tmp_path

    return make


def test_a_loss_of_one_value_a_sample_says_so(edgefl, odd):
    refused(
        edgefl(odd("each"), "--clients", "3", "--engine", "loop"), 1, "expected one number, the mean over the batch"
    )


def test_a_loss_that_is_a_sum_runs_but_is_not_stacked(edgefl, odd, tmp_path):
    folder = odd("total")
    status, out, _ = edgefl(folder, "--clients", "8", "--rounds", "1", "--set", "train.lr=0.01")
    assert status == 0
    assert "not stacked: " in out
    refused(edgefl(folder, "--clients", "8", "--rounds", "1", "--engine", "stacked"), 1, "stacked", "mean")
