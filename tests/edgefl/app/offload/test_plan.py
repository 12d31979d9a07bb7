"""`edgefl offload plan` and `profile`, as they are typed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.app.offload.plan import PlanFlags
from edgefl.errors import ConfigError
from tests.edgefl.offload.graphs import node, residual, rows, weight, write


@pytest.fixture
def edgefl(tmp_path):
    def invoke(*arguments):
        return CliRunner(mix_stderr=False).invoke(cli, ["offload", *map(str, arguments)], env={"HOME": str(tmp_path)})

    return invoke


@pytest.fixture
def path(tmp_path):
    return residual(tmp_path / "m.onnx")


def test_a_plan_for_people_and_programs(edgefl, path, tmp_path):
    np.savez(tmp_path / "own.npz", x=rows(40))
    done = edgefl("plan", path, "--device", "5x", "--link", "20mbit,30ms", "--memory", "1kB",
                  "--samples", tmp_path / "own.npz", "--leak", "--plot", tmp_path / "p.png", "--json",
                  tmp_path / "p.json")  # fmt: skip
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    assert lines[1].split("\t")[1:4] == ["cut", "format", "bytes up"]
    assert sum(line.startswith("*\t") for line in lines) == 1
    assert "variance" in lines[2] or "variance" in lines[3]
    assert (tmp_path / "p.png").stat().st_size > 10_000
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["chosen"]["latency_ms"] == min(one["latency_ms"] for one in told["options"] if not one["refused"])
    assert told["options"][4]["leak"]["value"] == 1.0  # x crosses, too


def test_a_plan_without_an_attack_does_not_say_that_anything_is_safe(edgefl, path, tmp_path):
    arguments = ("plan", path, "--device", "5x", "--link", "1gbit,0ms", "--objective")
    assert "the inputs themselves leave the device" in edgefl(*arguments, "memory").stdout
    chain = [node("Relu", "x", "a"), node("Tanh", "a", "b"), node("MatMul", "b w", "y")]
    arguments = ("plan", write(tmp_path / "chain.onnx", chain, ["x"], ["y"], [weight("w", 4, 4)]), *arguments[2:])
    done = edgefl(*arguments, "memory", "--may-leave", "activations")
    assert done.exit_code == 0, done.exception
    assert "activations leave the device; how much can be read from them was not measured: --leak" in done.stdout
    assert "private" not in done.stdout.lower()


def test_a_profile_of_a_device_is_used_by_a_plan(edgefl, path, tmp_path):
    done = edgefl("profile", path, "--json", tmp_path / "device.json")
    assert done.exit_code == 0, done.exception
    assert "\tMatMul\t" in done.stdout
    told = json.loads((tmp_path / "device.json").read_text())
    assert next(iter(told["layers_ms"])) == "MatMul_xa"
    planned = edgefl("plan", path, "--device", tmp_path / "device.json", "--link", "1kbit,1s", "--json", "-")
    assert planned.exit_code == 0, planned.exception
    assert json.loads(planned.stdout)["chosen"]["cut"] == "all on the device"


FLAGS = {"device": "5x", "link": "1mbit,1ms", "memory": None, "objective": "latency", "within": None,
         "may_leave": "inputs", "formats": (), "max_drop": "0.02", "samples": None, "leak": False, "measure_all": False,
         "plot": None}  # fmt: skip


def test_sizes_and_times_as_they_are_typed():
    wish = PlanFlags(**FLAGS | {"memory": "64MB", "within": "0.1s", "formats": ("int8",)}).wish
    assert (wish.limits.memory_bytes, wish.limits.latency_ms, wish.formats) == (64e6, 100.0, ("int8",))
    assert PlanFlags(**FLAGS | {"memory": "1.5 KiB"}).wish.limits.memory_bytes == 1536


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"memory": "64"}, "--memory '64' is no number with a unit"),
        ({"within": "3"}, "--within '3' is no number with a unit"),
        ({"link": "fast"}, "--link 'fast' is not RATE,ROUNDTRIP"),
        ({"max_drop": "7"}, "--max-drop 7 must be in 0..1"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_work(wrong, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        PlanFlags(**FLAGS | wrong).check()


def test_plots_and_attacks_that_cannot_be_made_are_refused(edgefl, path, tmp_path):
    done = edgefl("plan", path, "--device", "5x", "--link", "1mbit,1ms", "--plot", tmp_path / "plot.doc")
    assert "the extension must be one of" in str(done.exception)
    done = edgefl("plan", path, "--device", "5x", "--link", "1mbit,1ms", "--leak")
    assert "--leak attacks your own samples" in str(done.exception)
    np.savez(tmp_path / "own.npz", y=rows(40))
    done = edgefl("plan", path, "--device", "5x", "--link", "1mbit,1ms", "--samples", tmp_path / "own.npz")
    assert "it has the inputs y, the model takes x" in str(done.exception)
