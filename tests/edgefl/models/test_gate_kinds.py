"""Regression, segmentation, multi-label and ranking: each judged by its own metric, as scikit-learn computes it.

For each, a good int8 file passes the gate, and its metric before and after equals scikit-learn's on the outputs of the
served file; the same file damaged is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import torch
import torchmetrics
from onnx import numpy_helper
from sklearn.metrics import average_precision_score, jaccard_score, r2_score, roc_auc_score
from torch import nn

from edge_agent.serving.api import Serving, bind, url_of
from edge_agent.sessions import Models, load
from edgefl import Task
from edgefl.errors import AccuracyGateFailed
from edgefl.models import compress
from edgefl.models.gate import split
from edgefl.models.session import open_session
from edgefl.operator.publish import export
from edgefl.training.local import initial_parameters
from edgefl.training.samples import test_samples as held_out
from edgefl.trees import write_tree

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(400, 8)).astype(np.float32)
PICTURES = RNG.normal(size=(60, 1, 8, 8)).astype(np.float32)


@dataclass(frozen=True)
class Kind:
    """A task, and its metric by scikit-learn."""

    metric: str
    task: Task
    score: Callable[[np.ndarray, np.ndarray], float]  # (targets, outputs)


def fitted(hidden, inputs, targets, last):
    """A model whose last layer is the least-squares solution over random features."""

    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            body = hidden()
        with torch.no_grad():
            features = body(torch.from_numpy(inputs))
        flat = features.movedim(1, -1).flatten(0, -2) if features.dim() > 2 else features
        # By singular values: the default, with pivots, gives different solutions at times, as some features are zero.
        solved = torch.linalg.lstsq(flat.double(), torch.from_numpy(targets).double(), driver="gelsd")
        weights = solved.solution.T.contiguous()
        head = last(*reversed(weights.shape))
        with torch.no_grad():
            head.weight.copy_(weights.reshape(head.weight.shape))
        return nn.Sequential(*body, head)

    return make


def dense():
    return nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 1), nn.ReLU())


def table_task(name, wanted, targets, loss, metric):
    return Task(
        name=name,
        model=fitted(dense, TABLE, wanted, lambda n, m: nn.Linear(n, m, bias=False)),
        loss=loss,
        train_data=lambda: (TABLE, targets),
        test_data=lambda: (TABLE, targets),
        metrics=metric,
    )


def noisy(values, scale):
    return (values + scale * RNG.normal(size=values.shape)).astype(np.float32)


CURVE = noisy(np.sin(TABLE[:, :1]) + TABLE[:, 1:2] * 0.5, 0.2)
LABELS = (noisy(TABLE[:, :3], 0.5) > 0).astype(np.int64)
CLICKS = (noisy(TABLE[:, :1] - TABLE[:, 1:2], 0.7) > 1).astype(np.int64)
PIXELS = (noisy(PICTURES[:, 0], 0.4) > 0.5).astype(np.int64)
ONE_HOT = np.eye(2, dtype=np.float32)[PIXELS].reshape(-1, 2)


def yes_or_no(outputs, targets):
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))


KINDS = [
    Kind(
        "r2",
        table_task("regression", CURVE, CURVE, nn.functional.mse_loss, {"r2": torchmetrics.R2Score()}),
        r2_score,
    ),
    Kind(
        "jaccard",
        Task(
            name="segmentation",
            model=fitted(convolutions, PICTURES, ONE_HOT, lambda n, m: nn.Conv2d(n, m, 1, bias=False)),
            loss=nn.functional.cross_entropy,
            train_data=lambda: (PICTURES, PIXELS),
            test_data=lambda: (PICTURES, PIXELS),
            metrics={"jaccard": torchmetrics.JaccardIndex(task="multiclass", num_classes=2)},
        ),
        lambda targets, outputs: jaccard_score(targets.ravel(), outputs.argmax(1).ravel(), average="macro"),
    ),
    Kind(
        "precision",
        table_task(
            "multi-label", LABELS.astype(np.float32) * 2 - 1, LABELS, yes_or_no,
            {"precision": torchmetrics.AveragePrecision(task="multilabel", num_labels=3)},
        ),
        lambda targets, outputs: average_precision_score(targets, outputs, average="macro"),
    ),
    Kind(
        "auc",
        table_task(
            "ranking", CLICKS.astype(np.float32), CLICKS, yes_or_no, {"auc": torchmetrics.AUROC(task="binary")}
        ),
        lambda targets, outputs: roc_auc_score(targets[:, 0], outputs[:, 0]),
    ),
]  # fmt: skip


def exported(kind, folder: Path, **options):
    parameters = folder / "p.safetensors"
    with parameters.open("wb") as file:
        write_tree(initial_parameters(kind.task), file)
    return export(kind.task, parameters, folder, compression="int8", max_drop=0.05, gate=kind.metric, **options)


def served(path: Path, inputs: np.ndarray) -> np.ndarray:
    """The outputs of a file at a device's endpoint."""

    async def inside():
        models, listener = Models(), bind("127.0.0.1", 0)
        models.put(await asyncio.to_thread(load, "m", 1, path))
        serving = Serving(models, listener)
        serving.ready = True
        running = asyncio.create_task(serving.run())
        tensor = {"name": "input", "shape": inputs.shape, "datatype": "FP32", "data": inputs.ravel().tolist()}
        try:
            async with httpx.AsyncClient(base_url=url_of(listener), trust_env=False, timeout=60) as client:
                answer = await client.post("/v2/models/m/infer", json={"inputs": [tensor]})
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        [output] = answer.json()["outputs"]
        return np.array(output["data"]).reshape(output["shape"])

    return asyncio.run(inside())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.task.name)
def test_a_good_int8_has_the_metric_of_scikit_learn_before_and_after(tmp_path, kind):
    found = exported(kind, tmp_path)
    assert (found.path.name, found.report["measure"]) == ("model.int8.onnx", kind.metric)
    judging = split(held_out(kind.task, {}))[1]
    inputs, targets = judging.inputs.numpy(), judging.targets.numpy()
    [before] = open_session(tmp_path / "model.onnx").run(None, {"input": inputs})
    assert found.metrics[f"before/{kind.metric}"] == pytest.approx(kind.score(targets, before), abs=1e-5)
    after = kind.score(targets, served(found.path, inputs))
    assert found.metrics[kind.metric] == found.report["after"] == pytest.approx(after, abs=1e-5)
    assert kind.score(targets, before) > 0.6  # it has learned something
    assert found.report["drop"] == pytest.approx(found.report["before"] - found.report["after"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.task.name)
def test_a_damaged_int8_is_refused(tmp_path, kind, monkeypatch):
    quantise = compress._quantise

    def damaging(*arguments):
        path = quantise(*arguments)
        model = onnx.load(path)
        weights = max(model.graph.initializer, key=lambda one: len(one.raw_data))
        values = numpy_helper.to_array(weights)
        weights.CopyFrom(numpy_helper.from_array(np.flip(values, 0).copy(), weights.name))
        onnx.save(model, path)
        return path

    monkeypatch.setattr(compress, "_quantise", damaging)
    with pytest.raises(AccuracyGateFailed, match=rf"model\.onnx: {kind.metric} goes from 0\.\d+ to "):
        exported(kind, tmp_path)
    assert not (tmp_path / "model.int8.onnx").exists()
