"""`edgefl offload publish`, as it is typed, against a cloud."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.errors import ConfigError, NotFound
from edgefl.protocols.messages import ModelReport, Telemetry
from tests.edgefl.offload.graphs import node, value, weight, write


@pytest.fixture
def edgefl(http_plane, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nodes = [node("MatMul", "x a", "xa"), node("Relu", "xa", "h"), node("MatMul", "h b", "y")]
    output = value("y", ("n", 3))
    write(tmp_path / "m.onnx", nodes, ["x"], [output], [weight("a", 4, 4), weight("b", 4, 3, seed=1)])
    write(tmp_path / "small.onnx", [node("MatMul", "x c", "y")], ["x"], [output], [weight("c", 4, 3)])
    env = {"EDGEFL_CREDENTIALS": str(http_plane.credentials), "HOME": str(tmp_path)}

    def invoke(*arguments):
        return CliRunner(mix_stderr=False).invoke(cli, [*map(str, arguments)], env=env)

    return invoke


def test_a_release_of_a_file_then_one_of_that_release_then_a_plan_for_a_device(edgefl, http_plane) -> None:
    done = edgefl("models", "publish", "small", "--onnx", "small.onnx")
    assert done.exit_code == 0, done.exception
    done = edgefl("offload", "publish", "m.onnx", "--name", "big", "--cut", "split:Relu_h", "--format", "bf16",
                  "--fallback", "small:1", "--stages", "10.0.0.1:9450", "--within", "300ms")  # fmt: skip
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    assert lines[0] == "big version 1, placement split:Relu_h:"
    assert "bytes in bf16 cross (activations)" in lines[1]
    assert "how much can be read from what crosses was not measured" in lines[2]
    assert lines[3] == "serve its tail beside the cloud: edgefl cloud stages big:1 --home HOME"
    assert lines[4] == "deliver it to the devices: edgefl rollout start big --version 1"
    release = http_plane.registry.release("big")
    assert (release.offload.timeout_ms, release.offload.fallback.release) == (300.0, "small:1")
    done = edgefl("offload", "publish", "big", "--cut", "xa", "--whole", "device", "--json", "-")
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    assert (told["version"], told["blob"]) == (2, {"sha256": release.blob.sha256, "size": release.blob.size})
    assert told["offload"]["use"] == "auto"
    assert "no fall-back" in done.stderr

    plan = ("offload", "plan", "big", "--link", "20mbit,30ms", "--json", "-", "--device")
    assert "no device of this name" in str(edgefl(*plan, "cam").exception)
    http_plane.enroll("cam")
    assert "device cam has not measured big version 2: it does not serve it now" in str(edgefl(*plan, "cam").exception)
    reports = {"big": ModelReport(version=1, profile_ms={"device": 1000.0})}
    figures = dict.fromkeys(
        ("cpu_percent", "load_1m", "ram_total_mb", "ram_available_mb", "disk_free_mb"), 1.0
    )  # fmt: skip
    http_plane.link.measured["cam"] = Telemetry(cpu_count=1, **figures, models=reports)
    assert "it serves version 1 now" in str(edgefl(*plan, "cam").exception)
    done = edgefl(*plan, "cam", "--version", 1, "--max-drop", "1.0")
    assert done.exit_code == 0, done.exception
    whole = next(one for one in json.loads(done.stdout)["options"] if one["cut"] == "all on the device")
    assert 200 < whole["device_ms"] < 5000  # as the device said: a second, by other runs' noise here


def test_what_is_refused(edgefl) -> None:
    publish = ("offload", "publish", "m.onnx", "--cut", "split:Relu_h")
    for more, kind, words in (
        (("--within", "soon"), ConfigError, "--within 'soon' is no time, such as 300ms or 2s"),
        (("--fallback", "none.onnx"), ConfigError, "none.onnx: there is no such file"),
        (("--fallback", "small:x"), ConfigError, "'small:x' names no release; expected NAME or NAME:VERSION"),
        (("--fallback", "small"), NotFound, "there is no model 'small'"),
        (("--max-drop", "much"), ConfigError, "much"),
    ):
        done = edgefl(*publish, *more)
        assert isinstance(done.exception, kind), done.exception
        assert words in str(done.exception)
