import numpy as np

from benchmarks.fleet import echo_task
from edgefl.config import TrainConfig
from edgefl.task import load_task


def test_the_echo_task_has_the_size_asked_for(tmp_path) -> None:
    task = load_task(str(echo_task(tmp_path, model_bytes=64_000, tensors=2)))
    assert task.initial is not None
    assert sum(array.nbytes for array in task.initial().values()) == 64_000
    assert len(task.initial()) == 2


def test_the_echo_task_returns_what_it_got(tmp_path) -> None:
    task = load_task(str(echo_task(tmp_path, model_bytes=64_000, tensors=2)))
    assert task.fit is not None
    parameters = {"w0": np.ones(3, np.float32)}
    first, second = (task.fit(parameters, TrainConfig(), {}) for _ in range(2))
    assert first.tree is parameters
    assert first.weight == 1
    assert second.metrics["train_fit_s"] >= first.metrics["train_fit_s"]
