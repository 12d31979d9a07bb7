"""The Flower apps of the examples give the same in edgefl's engine as in Flower's own (Ray), unmodified."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulation_contest import Contestant, run

EXAMPLES = Path(__file__).parents[2] / "examples"
NODES, ROUNDS = 3, 2


def arrays_of(app, engine, folder):
    """Run an app in a process of its own; return the arrays after its last round."""
    file = folder / f"{engine}.npz"
    start = [sys.executable, "-m", "benchmarks.simulation_rivals.flower_folder", EXAMPLES / app, "--engine", engine]
    command = [*start, "--nodes", str(NODES), "--rounds", str(ROUNDS), "--arrays", file]
    run(Contestant(name=f"{app} in {engine}", command=lambda _folder, _rounds: command, threads=1), ROUNDS)
    with np.load(file) as saved:
        return [saved[name] for name in saved.files]


def both(app, folder, tolerance):
    ours, theirs = arrays_of(app, "edgefl", folder), arrays_of(app, "flower", folder)
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance)


@pytest.mark.soak
def test_scikit_learn(tmp_path):
    both("sklearn-app", tmp_path, 1e-6)


@pytest.mark.soak
def test_pytorch(tmp_path):
    both("flower-app", tmp_path, 1e-6)


@pytest.mark.soak
@pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs TensorFlow: pip install '.[keras]'")
def test_keras(tmp_path):
    """Replies are summed in the order in which they come; float32 rounds that, and training makes more of it."""
    both("keras-app", tmp_path, 1e-4)
