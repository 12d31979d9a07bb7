"""Federated evaluation on one device: its own samples, its own function, and all that can be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgefl import ConfigError, EvalResult, FitResult, Task
from edgefl.config import TrainConfig
from edgefl.records import DeviceEvaluation, EvaluationSpec
from edgefl.training import initial_parameters, train_locally
from edgefl.training.local_evaluation import evaluate_locally, evaluation_spec
from edgefl.trees import Tree

IDENTITY = {"weight": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32)}


def _train_data() -> tuple[Any, Any]:
    return np.eye(2, dtype=np.float32), np.array([0, 1])


def _eval_data(own: str = "0") -> tuple[Any, Any]:
    """Of four samples the model is right about the first three."""
    inputs = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    return inputs[int(own) :], np.array([0, 1, 1, 1])[int(own) :]


def _accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return (outputs.argmax(1) == targets).float().mean().item()


def _nan(_outputs: torch.Tensor, _targets: torch.Tensor) -> float:
    return math.nan


def _task(**changes: Any) -> Task:
    known: dict[str, Any] = {
        "name": "two", "model": lambda: nn.Linear(2, 2), "loss": nn.functional.cross_entropy,
        "train_data": _train_data, "eval_data": _eval_data, "metrics": {"accuracy": _accuracy},
    }  # fmt: skip
    return Task(**known | changes)


def _fitting(**changes: Any) -> Task:
    known: dict[str, Any] = {
        "name": "own", "initial": lambda: {"w": np.ones(1, np.float32)},
        "fit": lambda tree, _config, _options: FitResult(tree=tree, weight=1.0),
        "evaluate_locally": lambda tree, options: EvalResult(metrics={"gain": float(tree["w"][0])},
                                                            weight=float(options["n"])),
    }  # fmt: skip
    return Task(**known | changes)


def _evaluated(task: Task, parameters: Tree = IDENTITY, **options: str) -> DeviceEvaluation:
    return evaluate_locally(task, parameters, options=options, client="cam", seed=0)


def test_the_received_parameters_are_evaluated_on_the_devices_own_samples() -> None:
    found = _evaluated(_task(), own="0")
    assert (found.fault, found.weight) == ("", 4.0)
    assert found.metrics["accuracy"] == 0.75
    right, wrong = math.log1p(math.exp(-1)), math.log1p(math.e)
    assert found.metrics["loss"] == pytest.approx((3 * right + wrong) / 4)
    assert _evaluated(_task(), own="3").metrics["accuracy"] == 0.0


def test_an_evaluation_changes_nothing_of_the_training() -> None:
    task = _task()
    start = initial_parameters(task)
    before = train_locally(task, start, TrainConfig(), options={}, round=1, client="cam")
    evaluate_locally(task, start, options={}, client="cam", seed=0)
    after = train_locally(task, start, TrainConfig(), options={}, round=1, client="cam")
    assert all(np.array_equal(before.tree[name], after.tree[name]) for name in start)


def test_what_devices_report_is_known_before() -> None:
    assert evaluation_spec(_task(eval_data=None)) is None
    expected = EvaluationSpec(directions={"loss": False, "accuracy": True})
    assert evaluation_spec(_task()) == expected
    assert evaluation_spec(_fitting(higher_is_better={"gain": True})) == EvaluationSpec(
        directions={"gain": True}, declared=False
    )


def _raises() -> tuple[Any, Any]:
    raise KeyError("no such file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"eval_data": lambda: (np.zeros((0, 2)), np.zeros(0))},
            "the device has no data: eval_data returned 0 samples",
        ),
        ({"eval_data": _raises}, "eval_data raised KeyError: 'no such file' ("),
        ({"eval_data": lambda: np.zeros(3)}, "eval_data returned ndarray, not (inputs, targets)"),
        ({"eval_data": lambda: (np.zeros((2, 3)), np.zeros(2))}, "local evaluation raised RuntimeError"),
        ({"metrics": {"accuracy": _nan}}, "metric 'accuracy' is nan, not a finite number"),
    ],
)
def test_a_device_that_cannot_evaluate_says_why(changes: Mapping[str, Any], words: str) -> None:
    found = _evaluated(_task(**changes))
    assert words in found.fault
    assert found.metrics == {}


def test_the_fault_of_a_loader_has_the_users_file_and_line() -> None:
    line = _raises.__code__.co_firstlineno + 1
    assert f"({__file__}:{line})" in _evaluated(_task(eval_data=_raises)).fault


def test_data_options_that_eval_data_does_not_know_are_named() -> None:
    assert "cannot take the data options {'skew': '1'}" in _evaluated(_task(), skew="1").fault


def test_parameters_that_are_not_the_models_are_a_fault() -> None:
    assert "not the parameters of its model" in _evaluated(_task(), {"w": np.zeros(1, np.float32)}).fault


def test_a_task_with_fit_evaluates_by_its_own_function() -> None:
    found = _evaluated(_fitting(), {"w": np.full(1, 3.0, np.float32)}, n="5")
    assert (found.metrics, found.weight, found.fault) == ({"gain": 3.0}, 5.0, "")


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"gain": 1.0}, "evaluate_locally returned a dict, not an edgefl.EvalResult"),
        (EvalResult(metrics={}, weight=1), "it has 0 metrics"),
        (EvalResult(metrics={"gain": 1.0}, weight=0), "weight 0.0 must be finite, above 0"),
        (EvalResult(metrics={"gain": "high"}, weight=1), "metric 'gain' returned str; expected one number"),
        (EvalResult(metrics={"gain": 1.0, "gain/std": 1.0}, weight=1), "would both be devices/gain/std"),
        (EvalResult(metrics={"a/b": 1.0, "a": {"b": 2.0}}, weight=1), "returned two numbers 'a/b'"),
        (EvalResult(metrics=[1.0], weight=1), "evaluate_locally's metrics are a list"),  # type: ignore[arg-type]
        (EvalResult(metrics={"gain": 1.0}, weight="x"), "weight must be a number"),  # type: ignore[arg-type]
    ],
)
def test_a_result_of_ones_own_function_that_cannot_count_says_why(result: object, words: str) -> None:
    assert words in _evaluated(_fitting(evaluate_locally=lambda _tree, _options: result)).fault


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (_task, {"evaluate_locally": lambda *_: None}, "evaluate_locally belongs to a task with fit"),
        (_fitting, {"eval_data": _eval_data}, "eval_data belongs to a task with model and loss"),
        (_task, {"metrics": {"devices/a": _accuracy}}, "metric 'devices/a' begins with devices/"),
        (_task, {"metrics": {"count": _accuracy}}, "devices/count is the number of devices"),
        (_task, {"metrics": {"loss/std": _accuracy}}, "would both be devices/loss/std"),
    ],
)
def test_a_task_that_cannot_be_evaluated_on_devices_is_refused(make: Any, changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("/", "/")):
        make(**changes)
    assert replace(_task(metrics={}), eval_data=None).eval_data is None
