"""The examples on two real devices: trained, published, rolled out, and asked for predictions, as their READMEs say."""

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from edgefl.local_fleet import LocalFleet
from edgefl.task import load_task
from edgefl.training.local import make_model
from edgefl.training.structures import call, named
from edgefl.trees import SpooledTree

EXAMPLES = Path(__file__).parents[2] / "examples"
PARTS, ROWS, WITHIN = 2, 3, 1e-4  # relative to the largest output
XGBOOST = pytest.mark.skipif(find_spec("xgboost") is None, reason="needs XGBoost: pip install '.[examples]'")


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """A cloud and two devices."""
    with LocalFleet(tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.start()
        for part in range(PARTS):
            fleet.enroll(f"device-{part}")
            options = ("--data", f"part={part}", "--data", f"parts={PARTS}")
            fleet.start_agent(f"device-{part}", *options, env={"OMP_NUM_THREADS": "1"})
        for agent in fleet.agents.values():
            agent.wait_for("mqtt.up")
        yield fleet


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "metric", "least"),
    [
        ("tabular", "r2", 0.3),
        pytest.param("tabular/trees", "r2", 0.1, marks=XGBOOST),
        ("text", "accuracy", 0.6),
        ("sensor", "accuracy", 0.5),
        ("lora", "accuracy", 0.4),
    ],
)
def test_an_example_from_training_to_predictions(devices, tmp_path, name, metric, least):
    folder, model = EXAMPLES / name, name.replace("/", "-")
    result, parameters = tmp_path / "result.json", tmp_path / "parameters.safetensors"
    devices.command(
        "run", folder, "--cloud", devices.url, "--config", folder / "config.toml", "--set", "rounds.count=2",
        "--json", result, "--out", parameters, timeout_s=110,
    )  # fmt: skip
    said = json.loads(result.read_text())
    assert [one["admitted"] for one in said["rounds"]] == [PARTS] * 2
    assert said["final"][metric] > least
    published = tmp_path / "release.json"
    devices.command(
        "models", "publish", model, "--task", folder, "--job", said["job"], "--compress", "none",
        "--cloud", devices.url, "--json", published, timeout_s=110,
    )  # fmt: skip
    assert json.loads(published.read_text())["metrics"][metric] == pytest.approx(said["final"][metric], abs=1e-6)
    devices.command("rollout", "start", model, "--wait", 60, "--cloud", devices.url, timeout_s=90)
    inputs, outputs = expected(load_task(str(folder)), SpooledTree(parameters))
    for part in range(PARTS):
        url = (devices.folder / f"device-{part}" / "serving").read_text().strip()
        for output, wanted in zip(predictions(url, model, inputs), outputs, strict=True):
            allowed = WITHIN * max(1.0, np.abs(wanted).max())
            np.testing.assert_allclose(output.reshape(wanted.shape), wanted, rtol=0, atol=allowed)


def expected(task, parameters):
    """Return inputs by name, and what PyTorch or the library itself predicts for them."""
    if task.model is None:
        (module,) = {import_module(task.fit.__module__)}
        inputs, _ = module.load_held_out()
        return {"input": inputs[:ROWS]}, [module.booster_of(parameters).predict(module.xgb.DMatrix(inputs[:ROWS]))]
    samples = import_module(task.test_data.__module__).load_held_out()
    if isinstance(samples, torch.utils.data.Dataset):
        items = [samples[index][0] for index in range(ROWS)]
        inputs = {key: torch.from_numpy(np.stack([one[key] for one in items])) for key in items[0]}
    else:
        inputs = samples[0]
        inputs = (
            {key: torch.from_numpy(one[:ROWS]) for key, one in inputs.items()}
            if isinstance(inputs, dict)
            else torch.from_numpy(inputs[:ROWS])
        )
    with torch.no_grad():
        outputs = call(make_model(task, parameters).eval(), inputs)
    return {key: one.numpy() for key, one in named(inputs, "input").items()}, [outputs.numpy()]


def predictions(url, model, inputs):
    """Ask a device by the Open Inference Protocol."""
    with httpx.Client(base_url=f"{url}/v2/models/{model}", trust_env=False, timeout=60) as http:
        types = {one["name"]: one["datatype"] for one in http.get("").json()["inputs"]}
        body = [
            {"name": name, "shape": one.shape, "datatype": types[name], "data": one.ravel().tolist()}
            for name, one in inputs.items()
        ]
        answer = http.post("/infer", json={"inputs": body})
    assert not answer.is_error, answer.text
    return [np.array(one["data"]).reshape(one["shape"]) for one in answer.json()["outputs"]]
