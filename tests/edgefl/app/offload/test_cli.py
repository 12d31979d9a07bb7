"""`edgefl offload`, as it is typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.errors import ConfigError
from tests.edgefl.offload.graphs import node, residual, write


@pytest.fixture
def edgefl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        return CliRunner(mix_stderr=False).invoke(cli, ["offload", *map(str, arguments)], env={"HOME": str(tmp_path)})

    return invoke


def test_cuts_are_listed_for_people_and_programs(edgefl, tmp_path):
    path = residual(tmp_path / "m.onnx")
    done = edgefl("cuts", path)
    assert done.exit_code == 0, done.exception
    first, second, head, *lines = done.stdout.splitlines()
    assert first == "m.onnx: 5 cuts, 0 single"
    assert second == "weights that both sides of a cut need, such as tied ones, are in both: up to 64 bytes"
    assert head.split("\t")[:4] == ["cut", "operator", "bytes", "crosses"]
    assert lines[0] == ("split:MatMul_xa\tMatMul\t32\t2 tensors\t64\t128\tinputs\tx float32[1, 4], xa float32[1, 4]")
    told = json.loads(edgefl("cuts", path, "--json", "-").stdout)
    assert (told["model"], told["inputs"], len(told["cuts"])) == ("m.onnx", {"x": [1, 4]}, 5)
    assert told["cuts"][0]["shared_parameter_bytes"] == 64


def test_a_model_without_a_cut_is_told(edgefl, tmp_path):
    one = write(tmp_path / "m.onnx", [node("Relu", "x", "y")], ["x"], ["y"])
    assert str(edgefl("cuts", one).exception) == "m.onnx cannot be split: it has 1 layer, and no cut"
    done = edgefl("cuts", residual(tmp_path / "m.onnx"), "--single")
    assert isinstance(done.exception, ConfigError)
