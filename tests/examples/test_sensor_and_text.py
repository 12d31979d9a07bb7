"""The sensor example learns what no device has seen, and its model is exported as the devices will run it."""

from pathlib import Path

import pytest

import edgefl
from edgefl.models.export import export_task
from edgefl.task import load_task

FOLDER = Path(__file__).parents[2] / "examples" / "sensor"


@pytest.fixture(scope="module")
def trained():
    return edgefl.simulate(FOLDER, clients=3, rounds=2, engine="loop", config=FOLDER / "config.toml")


def test_it_learns(trained):
    first, last = (one.metrics["accuracy"] for one in trained.rounds)
    assert last > max(first, 0.6)


def test_its_model_is_exported_and_computes_the_same(trained, tmp_path):
    export_task(load_task(str(FOLDER)), trained.parameters, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 10_000


def test_devices_evaluate_on_their_own_recordings(trained):
    final = trained.final
    assert final["devices/count"] == 3
    assert 0 < final["devices/accuracy/worst_tenth"] <= final["devices/accuracy"] <= 1
