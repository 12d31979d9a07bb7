"""The stop metric against the task: unknown ones are refused before any work, directions come from the task."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError
from edgefl.task import FitResult, Task
from edgefl.training.early_stop import with_stop_direction


def stop(metric, **more):
    return from_dict(JobConfig, {"rounds": {"stop": {"metric": metric, "patience": 1, **more}}})


def samples():
    return torch.zeros(2, 1), torch.zeros(2, 1)


TASK = Task(
    name="t", model=lambda: torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss, train_data=lambda **_: samples(),
    test_data=lambda **_: samples(), eval_data=lambda **_: samples(),
    metrics={"goodness": lambda outputs, _targets: outputs.mean()}, higher_is_better={"goodness": True},
)  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("goodness", "max"), ("devices/goodness", "max"), ("devices/goodness/worst_tenth", "max"), ("loss", "min"),
     ("devices/loss", "min")],
)  # fmt: skip
def test_the_task_says_which_way_is_better(metric, direction):
    assert with_stop_direction(stop(metric), TASK).rounds.stop.direction == direction


def test_a_metric_that_is_not_measured_is_refused():
    with pytest.raises(
        ConfigError, match=r"'accuracy' is not measured for task 't'; it has train_loss, loss, goodness"
    ):
        with_stop_direction(stop("accuracy"), TASK)


def test_a_task_with_fit_may_report_anything_but_must_say_the_direction():
    task = Task(name="f", initial=lambda: {"w": np.zeros(1)}, fit=lambda *_: FitResult(tree={}, weight=1.0))
    with pytest.raises(ConfigError, match=r"Add rounds\.stop\.direction"):
        with_stop_direction(stop("train_delta"), task)
    assert with_stop_direction(stop("train_delta", direction="max"), task).rounds.stop.direction == "max"
    assert with_stop_direction(JobConfig(), task) == JobConfig()
