"""The CIFAR-10 example on a few real pictures, where they are on this machine."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.task import load_task
from edgefl.training.evaluation import evaluate
from edgefl.training.local import initial_parameters, train_locally

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("EDGEFL_TEST_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"there is no {DATA}: set EDGEFL_TEST_DATA to a folder that has cifar10/*.parquet"
)


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("CIFAR10_PATH", raising=False)
    return load_task(str(ROOT / "examples" / "cifar10"))


@needs_data
def test_a_part_is_decoded_and_normalised(task):
    inputs, targets = task.train_data(path=str(DATA), part="3", parts="10", skew="1", limit="200")
    assert (inputs.shape, inputs.dtype, targets.shape) == ((200, 3, 32, 32), np.float32, (200,))
    assert set(targets) == {3}
    again, _ = task.train_data(path=str(DATA / "train.parquet"), part="3", parts="10", skew="1", limit="200")
    assert np.array_equal(inputs, again)


@needs_data
def test_held_out_pictures_are_found_by_the_environment(task, monkeypatch):
    monkeypatch.setenv("CIFAR10_PATH", str(DATA))
    inputs, targets = task.test_data(limit="300")
    assert len(set(targets)) == 10
    assert abs(inputs.mean()) < 0.1
    assert 0.9 < inputs.std() < 1.1


@needs_data
def test_it_trains_and_is_evaluated(task):
    start = initial_parameters(task)
    options = {"path": str(DATA), "part": "0", "parts": "10", "limit": "64"}
    result = train_locally(task, start, TrainConfig(lr=0.05), options=options, round=1, client="a")
    assert result.weight == 64
    assert result.metrics["train_loss"] == pytest.approx(2.3, abs=0.2)
    assert 0 <= evaluate(task, start, {"path": str(DATA), "limit": "64"})["accuracy"] <= 1


def test_without_files_and_without_datasets_it_says_what_to_do(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"--data path=FOLDER.*CIFAR10_PATH.*pip install datasets"):
        task.test_data()


def test_a_path_without_pictures(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no train\*\.parquet below"):
        task.train_data(path=str(tmp_path))


def test_a_part_that_there_is_not(task, tmp_path):
    options, start = {"path": str(tmp_path), "part": "9", "parts": "2"}, initial_parameters(task)
    with pytest.raises(TaskError, match=r"part=9 must be in 0\.\.1"):
        train_locally(task, start, TrainConfig(), options=options, round=1, client="a")
