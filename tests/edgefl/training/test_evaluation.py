"""Judging parameters: means worked out by hand, and metrics that misbehave."""

import os
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training.evaluation import Judge, evaluate
from edgefl.training.local import initial_parameters
from edgefl.training.local_evaluation import evaluate_locally

X = np.array([[1.0], [2.0]], np.float32)
Y = np.array([[2.0], [4.0]], np.float32)


class Line(nn.Module):
    """y = w * x, with w a 0-d parameter that starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.w * x


def line_task(**changes):
    return replace(Task(name="line", model=Line, loss=mse_loss, train_data=lambda: (X, Y)), **changes)


def test_evaluation_by_hand():
    task = line_task(
        test_data=lambda: (np.arange(300.0)[:, None], np.zeros((300, 1))),
        metrics={"largest": lambda outputs, _: outputs.mean()},
    )
    seen = evaluate(task, {"w": np.array(2.0, np.float32)})
    assert seen == {
        "loss": pytest.approx(4 * (np.arange(300.0) ** 2).mean(), rel=1e-5),
        "largest": pytest.approx(299.0, rel=1e-5),
    }


def test_a_task_without_test_data_or_model_has_nothing_to_evaluate():
    assert evaluate(line_task(), {"w": np.array(2.0, np.float32)}) == {}


def test_one_judge_judges_one_model_after_another_and_loads_the_data_once():
    loads, inside = [], []

    def load(scale="1"):
        loads.append(scale)
        return X * float(scale), Y

    @contextmanager
    def computing():
        inside.append("in")
        yield

    judge = Judge(line_task(test_data=load), {"scale": "2"}, computing)
    assert judge.can
    seen = [judge({"w": np.array(w, np.float32)})["loss"] for w in (1.0, 2.0, 0.0)]
    assert seen == pytest.approx([0.0, (4 + 16) / 2, (4 + 16) / 2])  # targets 2 and 4, of inputs 2 and 4
    assert (loads, inside) == (["2"], ["in"] * 3)


def test_a_metric_that_raises():
    task = line_task(test_data=lambda: (X, Y), metrics={"m": lambda *_: 1 / 0})
    with pytest.raises(TaskError, match="evaluation raised ZeroDivisionError"):
        evaluate(task, initial_parameters(task))


class Remembering(torch.utils.data.Dataset):
    """A Dataset that writes down which processes read it."""

    def __init__(self, log):
        self.log = log

    def __len__(self):
        return 300

    def __getitem__(self, n):
        with self.log.open("a", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        return np.full(1, n, np.float32), np.zeros(1, np.float32)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_is_read_by_the_jobs_workers_with_the_same_result(tmp_path, workers):
    log = tmp_path / "readers"
    task = line_task(test_data=lambda: Remembering(log))
    seen = Judge(task, workers=workers)({"w": np.array(2.0, np.float32)})
    assert seen["loss"] == pytest.approx(4 * (np.arange(300.0) ** 2).mean(), rel=1e-5)
    readers = set(log.read_text("ascii").split())
    assert len(readers) == max(workers, 1)
    assert (str(os.getpid()) in readers) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_so_is_a_devices_own(tmp_path, workers):
    log = tmp_path / "readers"
    task = line_task(eval_data=lambda: Remembering(log))
    weights = {"w": np.array(2.0, np.float32)}
    seen = evaluate_locally(task, weights, options={}, client="c", seed=0, workers=workers)
    assert (seen.fault, seen.weight) == ("", 300.0)
    assert (str(os.getpid()) in log.read_text("ascii").split()) == (workers == 0)
