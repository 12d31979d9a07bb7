"""Metrics over a whole set: equal to scikit-learn's whatever the batches; directions; what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics
from torch import nn

from edgefl import Task, WholeSet
from edgefl.errors import ConfigError, TaskError
from edgefl.training.evaluation import evaluate, evaluate_model
from edgefl.training.local import initial_parameters
from edgefl.training.metrics import StreamingMetric, direction
from edgefl.training.samples import Samples

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(1000, 3)).astype(np.float32)
VALUES = (INPUTS @ np.array([[1.0], [2.0], [-1.0]], np.float32) + RNG.normal(size=(1000, 1))).astype(np.float32)
LABELS = (VALUES[:, 0] > 0.5).astype(np.int64)


class Fixed(nn.Module):
    """A model whose outputs are known: a sum of its inputs."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x.sum(1, keepdim=True) * self.scale


def regression(**metrics):
    return Task(
        name="t", model=Fixed, loss=nn.functional.mse_loss, train_data=lambda: (INPUTS, VALUES),
        test_data=lambda: (INPUTS, VALUES), metrics=metrics,
    )  # fmt: skip


def of(task):
    return evaluate(task, initial_parameters(task))


def rmse(outputs, targets):
    return (outputs - targets).square().mean().sqrt()


OUTPUTS = INPUTS.sum(1, keepdims=True)


def test_torchmetrics_own_are_exact_over_the_whole_set_and_functions_are_means():
    seen = of(
        regression(
            r2=torchmetrics.R2Score(),
            rmse=torchmetrics.MeanSquaredError(squared=False),
            mae=lambda outputs, targets: (outputs - targets).abs().mean(),
            worst=WholeSet(lambda outputs, targets: (outputs - targets).abs().max()),
        )
    )
    assert list(seen) == ["loss", "r2", "rmse", "mae", "worst"]
    assert seen["r2"] == pytest.approx(sklearn.metrics.r2_score(VALUES, OUTPUTS), rel=1e-5)
    assert seen["rmse"] == pytest.approx(sklearn.metrics.root_mean_squared_error(VALUES, OUTPUTS), rel=1e-5)
    assert seen["mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(VALUES, OUTPUTS), rel=1e-5)
    assert seen["worst"] == pytest.approx(np.abs(VALUES - OUTPUTS).max(), rel=1e-6)


def test_a_classification_by_auc_f1_and_confusion_matrix():
    task = replace(
        regression(
            auc=torchmetrics.AUROC(task="binary"),
            confusion=torchmetrics.ConfusionMatrix(task="binary"),
            all=torchmetrics.MetricCollection(
                {"f1": torchmetrics.F1Score(task="binary"), "recall": torchmetrics.Recall(task="binary")}
            ),
        ),
        model=lambda: nn.Sequential(Fixed(), nn.Sigmoid(), nn.Flatten(0)),
        loss=lambda outputs, targets: nn.functional.binary_cross_entropy(outputs, targets.float()),
        test_data=lambda: (INPUTS, LABELS),
    )
    seen = of(task)
    scores = 1 / (1 + np.exp(-OUTPUTS[:, 0]))
    assert seen["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(LABELS, scores), abs=1e-5)
    assert seen["all/f1"] == pytest.approx(sklearn.metrics.f1_score(LABELS, scores > 0.5), abs=1e-6)
    assert seen["all/recall"] == pytest.approx(sklearn.metrics.recall_score(LABELS, scores > 0.5), abs=1e-6)
    matrix = sklearn.metrics.confusion_matrix(LABELS, scores > 0.5)
    assert [[seen[f"confusion/{i}/{j}"] for j in range(2)] for i in range(2)] == matrix.tolist()


def test_an_object_begins_anew_with_each_evaluation():
    task = regression(r2=torchmetrics.R2Score())
    first = of(task)
    evaluate(task, {"scale": np.array([3.0], np.float32)})
    assert of(task) == first


def test_a_function_that_is_no_mean_over_samples_is_refused_with_the_way_out():
    with pytest.raises(TaskError, match=r"metric 'rmse' is not a mean over samples: .* for 16 samples.*WholeSet"):
        of(regression(rmse=rmse))
    assert of(regression(rmse=WholeSet(rmse)))["rmse"] == pytest.approx(
        sklearn.metrics.root_mean_squared_error(VALUES, OUTPUTS), rel=1e-5
    )


def test_a_sum_over_samples_is_refused():
    with pytest.raises(TaskError, match="'hits' is not a mean"):
        of(regression(hits=lambda outputs, targets: (outputs > targets).sum()))


def test_an_r2_of_a_function_is_refused():
    def r2(outputs, targets):
        return 1 - (outputs - targets).square().sum() / (targets - targets.mean()).square().sum()

    with pytest.raises(TaskError, match="'r2' is not a mean"):
        of(regression(r2=r2))
    assert of(regression(r2=WholeSet(r2)))["r2"] == pytest.approx(sklearn.metrics.r2_score(VALUES, OUTPUTS), rel=1e-5)


def test_one_sample_is_its_own_mean():
    samples = Samples(torch.ones(1, 3), torch.zeros(1, 1))
    assert evaluate_model(regression(rmse=rmse), Fixed(), samples)["rmse"] == 3.0


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda *_: "good", "'m' returned str; expected one number"),
        (lambda outputs, _: outputs, "expected one number"),
        (WholeSet(lambda *_: {}), "returned 0 numbers"),
        (WholeSet(lambda *_: np.zeros(101)), "returned 101 numbers; expected at least one and at most 100"),
        (WholeSet(lambda *_: None), "'m' returned NoneType"),
    ],
)
def test_what_is_no_number_is_refused(metric, words):
    with pytest.raises(TaskError, match=words):
        of(regression(m=metric))


def test_an_object_without_compute_is_refused_before_any_work():
    class Half:
        def update(self, outputs, targets): ...
        def reset(self): ...

    with pytest.raises(ConfigError, match="'m' is a Half with update, reset of update, compute and reset"):
        regression(m=Half())
    with pytest.raises(ConfigError, match="a metric is named 'loss'"):
        regression(loss=torchmetrics.MeanSquaredError())


def test_directions_by_the_task_the_metric_and_the_name():
    task = replace(regression(score=rmse, r2=rmse, mae=rmse), higher_is_better={"score": False})
    assert [task.direction_of(name) for name in ("score", "r2", "mae", "loss")] == [False, True, False, False]
    assert direction("x", torchmetrics.R2Score()) is True
    assert direction("x", torchmetrics.MeanSquaredError()) is False
    assert direction("x", WholeSet(rmse, higher_is_better=False)) is False
    assert direction("top_accuracy", rmse) is True
    assert direction("f1_error", rmse) is False
    assert direction("usefulness", rmse) is None
    with pytest.raises(ConfigError, match="higher_is_better names 'typo', which is no metric"):
        replace(task, higher_is_better={"typo": True})


def test_what_torchmetrics_gives_is_a_streaming_metric_and_a_function_is_none():
    assert isinstance(torchmetrics.R2Score(), StreamingMetric)
    assert not isinstance(rmse, StreamingMetric)
