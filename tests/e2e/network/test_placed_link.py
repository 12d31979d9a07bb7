"""A split model over a link that is cut, throttled to nothing and whole again, in the middle of requests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import stages
from benchmarks.network.machines import Machines, why_not
from benchmarks.offload_served import digest_of, enrol
from edge_agent.placement.placed_file import PlacedFile, text_of
from edgefl.models.session import new_session
from edgefl.offload.source import source_of_file
from edgefl.operator.publishing.placing import PlacingRequest, make_placed
from tests.edgefl.offload.graphs import node, value, weight, write

ROOT = Path(__file__).parents[3]
PORT, ROWS, WITHIN_S = 9450, 9, 300.0
OUTPUT = value("y", ("n", 3))


class Device:
    """The process on the device's machine."""

    def __init__(self, machine, folder) -> None:
        command = machine.command([sys.executable, "-m", "tests.e2e.network.placed_device", folder])
        self.popen = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, rows=ROWS):
        self.popen.stdin.write(f"{rows}\n")
        self.popen.stdin.flush()
        return json.loads(self.popen.stdout.readline())

    def until(self, placement):
        end_s = time.monotonic() + WITHIN_S
        while (found := self.ask())["placement"] != placement:
            assert time.monotonic() < end_s, found
            time.sleep(0.05)
        return found


@pytest.fixture
def split(tmp_path):
    """A stage server on one machine, a device on another; yields the machines, the device and what each computes."""
    if reason := why_not():
        pytest.skip(reason)
    nodes = [node("MatMul", "x a", "xa"), node("Relu", "xa", "h"), node("MatMul", "h b", "y")]
    weights = [weight("a", 4, 4), weight("b", 4, 3, seed=1)]
    whole = write(tmp_path / "net.onnx", nodes, ["x"], [OUTPUT], weights)
    small = write(tmp_path / "small.onnx", [node("MatMul", "x c", "y")], ["x"], [OUTPUT], [weight("c", 4, 3)])
    with Machines(["cloud", "device"]) as machines:
        enrol(tmp_path)
        (tmp_path / "parts").mkdir()
        address = f"{machines['cloud'].address}:{PORT}"
        request = PlacingRequest(
            name="net", cuts=["split:Relu_h"], form="fp32", fallback=small, stages=[address], timeout_ms=1500.0
        )
        placed = make_placed(source_of_file(whole), request, tmp_path / "parts")
        device = tmp_path / "device"
        for part, (file, sample) in placed.parts.items():
            shutil.copyfile(file, device / f"{part}.onnx")
            shutil.copyfile(sample, device / f"{part}.safetensors")
        text = text_of(
            PlacedFile(digest=digest_of(placed.file), offload=placed.offload, placements=["split:Relu_h"],
                       inputs=placed.accepted.inputs, outputs=placed.accepted.outputs)
        )  # fmt: skip
        (device / "placed.json").write_text(text)
        arguments = ["cloud", "stages", placed.file, "--model-name", "net", "--home", tmp_path / "home", "--host",
                     machines["cloud"].address, "--port", PORT, "--tail-from", "split:Relu_h"]  # fmt: skip
        command = machines["cloud"].command([sys.executable, "-m", "edgefl", *map(str, arguments)])
        with stages.running(command, "stages.ready"):
            one = Device(machines["device"], device)
            x = np.arange(4 * ROWS, dtype=np.float32).reshape(-1, 4)
            yield (
                machines,
                one,
                {by: new_session(path).run(["y"], {"x": x})[0] for by, path in (("whole", whole), ("small", small))},
            )
            one.popen.kill()
            one.popen.communicate()  # closes the pipes


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("fault", [{"cut": True}, {"mbps": 0.001}])
def test_a_link_that_fails_in_mid_batch_costs_the_cloud_s_part_alone(split, fault) -> None:
    machines, device, expected = split
    machines.set_link("device", delay_s=0.005)
    np.testing.assert_allclose(device.until("split:Relu_h")["y"], expected["whole"], rtol=1e-4, atol=1e-4)
    machines.set_link("device", delay_s=0.2)  # so that a request is on its way when the link fails
    failing = threading.Timer(0.1, lambda: machines.set_link("device", **fault))
    failing.start()
    found = device.until("fallback")
    np.testing.assert_allclose(found["y"], expected["small"], rtol=1e-4, atol=1e-4)
    assert found["fallback_reason"]
    for _ in range(20):
        assert device.ask()["placement"] == "fallback"
    machines.set_link("device", delay_s=0.005, cut=False, mbps=0.0)
    np.testing.assert_allclose(device.until("split:Relu_h")["y"], expected["whole"], rtol=1e-4, atol=1e-4)
