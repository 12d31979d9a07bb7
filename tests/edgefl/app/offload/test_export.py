"""What `edgefl offload export` writes has Triton's layout, and computes what the model does."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.app.offload.export import ExportRequest
from edgefl.errors import ConfigError
from edgefl.models.session import new_session
from tests.edgefl.offload.graphs import residual, rows


@pytest.fixture
def export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    residual(tmp_path / "m.onnx")

    def invoke(*arguments):
        command = ["offload", "export", "m.onnx", "--out", "models", *map(str, arguments)]
        return CliRunner(mix_stderr=False).invoke(cli, command, env={"HOME": str(tmp_path)})

    return invoke


def run(path, known):
    """Run a stage on what is known, and add what it returns."""
    session = new_session(path)
    names = [one.name for one in session.get_outputs()]
    feeds = {one.name: known[one.name] for one in session.get_inputs()}
    known |= dict(zip(names, session.run(None, feeds), strict=True))


def test_one_stage_and_the_devices_part(export, tmp_path):
    done = export("--cut", "split:Relu_h", "--head", "head.onnx", "--json", "-")
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    digest = hashlib.sha256((tmp_path / "m.onnx").read_bytes()).hexdigest()
    assert [(one["name"], one["version"], one["digest"], one["max_batch"]) for one in told["models"]] == [
        ("m.2", 1, digest, 32)
    ]
    assert {str(one.relative_to(tmp_path / "models")) for one in (tmp_path / "models").rglob("*")} == {
        "m.2", "m.2/config.pbtxt", "m.2/1", "m.2/1/model.onnx",
    }  # fmt: skip
    known = {"x": rows(3)}
    run(tmp_path / "head.onnx", known)
    run(tmp_path / "models" / "m.2" / "1" / "model.onnx", known)
    whole = new_session(tmp_path / "m.onnx").run(["y"], {"x": rows(3)})[0]
    np.testing.assert_allclose(known["y"], whole, rtol=1e-6)


def test_several_stages_are_an_ensemble(export, tmp_path):
    done = export("--cut", "split:MatMul_xa", "--cut", "hb", "--name", "net", "--max-batch", 0)
    assert done.exit_code == 0, done.exception
    first, second, whole, last = done.stdout.splitlines()
    assert whole == "net.1 version 1: xa FP32[-1,-1], x FP32[-1,4] -> y FP32[-1,4]"
    assert (first.split()[0], second.split()[0], last) == (
        "net.1-1", "net.1-2", "serve it: tritonserver --model-repository models"
    )  # fmt: skip
    known = {"x": rows(3)}
    known["xa"] = known["x"] @ np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    for name in ("net.1-1", "net.1-2"):
        run(tmp_path / "models" / name / "1" / "model.onnx", known)
    np.testing.assert_allclose(known["y"], new_session(tmp_path / "m.onnx").run(["y"], {"x": rows(3)})[0], rtol=1e-5)
    assert not any((tmp_path / "models" / "net.1" / "1").iterdir())


@pytest.mark.parametrize(
    ("cuts", "words"),
    [
        (["split:none"], "m.onnx has no cut 'split:none'"),
        (["split:Add_y"], "behind 'split:Add_y' no layer is left for the cloud"),
        (["hb", "xa"], "--cut hb --cut xa: give each cut once, in the order of the layers"),
    ],
)
def test_cuts_that_are_none(export, tmp_path, cuts, words):
    done = export(*(part for one in cuts for part in ("--cut", one)))
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)
    assert not (tmp_path / "models").exists()


def test_no_cut_is_no_request(tmp_path):
    with pytest.raises(ConfigError, match="name the cut at which the devices' part ends: --cut"):
        ExportRequest(cuts=[], folder=tmp_path, name="m")
