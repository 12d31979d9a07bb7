"""The sensor and the text example learn what no device has seen, and are exported as the devices will run them."""

from pathlib import Path

import pytest

import edgefl
from edgefl.models.export import export_task
from edgefl.task import load_task

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", params=["sensor", "text"])
def trained(request):
    """The folder of an example, and its result after two rounds."""
    folder = EXAMPLES / request.param
    return folder, edgefl.simulate(folder, clients=3, rounds=2, engine="loop", config=folder / "config.toml")


def test_it_learns(trained):
    first, last = (one.metrics["accuracy"] for one in trained[1].rounds)
    assert last > max(first, 0.6)


def test_its_model_is_exported_and_computes_the_same(trained, tmp_path):
    folder, result = trained
    export_task(load_task(str(folder)), result.parameters, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 10_000


def test_devices_evaluate_on_their_own_samples_where_they_hold_some_out(trained):
    folder, result = trained
    if folder.name == "sensor":
        assert result.final["devices/count"] == 3
        assert 0 < result.final["devices/accuracy/worst_tenth"] <= result.final["devices/accuracy"] <= 1
    else:
        assert not [name for name in result.final if name.startswith("devices/")]
