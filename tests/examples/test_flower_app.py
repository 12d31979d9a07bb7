"""The two Flower apps of the examples run unmodified and give what plain computation gives."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from edgefl.flower import is_flower_app, load_flower_app, run_flower_app

EXAMPLES = Path(__file__).parents[2] / "examples"
PARTS, ROUNDS = 4, 2


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name, **config):
    assert is_flower_app(EXAMPLES / name)
    app = load_flower_app(EXAMPLES / name)
    return run_flower_app(app, PARTS, {"num-server-rounds": ROUNDS, **config}, workers=0), import_module(
        f"{name.replace('-', '_')}.task"
    )


def averaged(parts):
    """The weighted mean of lists of arrays."""
    total = sum(weight for _, weight in parts)
    return [sum(w / total * arrays[i] for arrays, w in parts) for i in range(len(parts[0][0]))]


def test_pytorch_by_hand():
    result, task = run("flower-app")
    model = task.make_model(0)
    for _ in range(ROUNDS):
        parts = []
        for part in range(PARTS):
            net = task.Net()
            net.load_state_dict(model.state_dict())
            data = task.load_part(part, PARTS)
            task.train(net, data, epochs=1, lr=0.1, batch=16)
            parts.append(([tensor.numpy() for tensor in net.state_dict().values()], len(data[1])))
        new = dict(zip(model.state_dict(), map(torch.tensor, averaged(parts)), strict=True))
        model.load_state_dict(new)
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(result.arrays[name].numpy(), tensor.numpy(), atol=1e-6)
    assert result.final["accuracy"] == pytest.approx(task.test(model, task.load_held_out())[1])
    assert [one.admitted for one in result.rounds] == [PARTS] * ROUNDS


def test_pytorch_learns():
    result, _ = run("flower-app", **{"num-server-rounds": 5, "local-epochs": 2, "fraction-evaluate": 0.0})
    assert result.final["accuracy"] > 0.9


def test_scikit_learn_by_hand():
    result, task = run("sklearn-app")
    weights = None
    for _ in range(ROUNDS):
        parts = []
        for part in range(PARTS):
            data = task.load_part(part, PARTS)
            parts.append((task.train(task.make_model(weights, epochs=20, penalty=0.0001), data), len(data[1])))
        weights = averaged(parts)
    for seen, wanted in zip(result.arrays.to_numpy_ndarrays(), weights, strict=True):
        np.testing.assert_allclose(seen, wanted, atol=1e-6)
    assert result.final["accuracy"] == task.make_model(weights).score(*task.load_held_out()) > 0.9


@pytest.mark.soak
@pytest.mark.parametrize("name", ["flower-app", "sklearn-app", "keras-app"])
def test_flowers_own_command_takes_it(name, tmp_path):
    copy = tmp_path / name
    shutil.copytree(EXAMPLES / name, copy, ignore=shutil.ignore_patterns("__pycache__"))
    flwr = Path(sys.executable).with_name("flwr")
    environment = {**os.environ, "FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(
        [flwr, "build"], cwd=copy, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert len(list(copy.glob("*.fab"))) == 1, done.stdout + done.stderr
