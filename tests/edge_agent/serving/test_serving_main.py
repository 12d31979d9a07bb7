"""The serving process by itself: what it answers its agent, and that it ends with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from edge_agent.serving import wire
from edge_agent.serving.api import bind, url_of
from edge_agent.serving.board import new_descriptor
from tests import onnx_models


class Process:
    """A serving process; the test is its agent."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        listener, board = bind("127.0.0.1", 0), new_descriptor()
        numbers = {"control": theirs.fileno(), "listen": listener.fileno(), "board": board}
        command = [sys.executable, "-P", "-m", "edge_agent.serving.serving_main", "--memory-mb=2000"]
        self.popen = subprocess.Popen(
            command + [f"--{name}={number}" for name, number in numbers.items()], pass_fds=numbers.values()
        )
        self.url = url_of(listener)
        for one in (theirs, listener):
            one.close()
        os.close(board)
        self._control.settimeout(60)
        self._lines = self._control.makefile("rb")

    def say(self, message) -> None:
        self._control.sendall(wire.line(message))

    def receive(self):
        return wire.parse(self._lines.readline())

    def hang_up(self) -> None:
        self._lines.close()
        self._control.close()


@pytest.fixture
def process():
    one = Process()
    yield one
    one.hang_up()
    one.popen.kill()
    one.popen.wait()


def infer(url, version=None):
    path = "/v2/models/m/infer" if version is None else f"/v2/models/m/versions/{version}/infer"
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 2.0, 3.0]}
    return httpx.post(url + path, json={"inputs": [tensor]}, trust_env=False, timeout=30)


def test_it_loads_switches_forgets_and_drops(process, tmp_path):
    process.say(wire.StartServing(log_level=20))
    assert process.receive() == wire.ServingUp(pid=process.popen.pid)
    assert infer(process.url).status_code == 503  # not ready: it may come
    for version in (1, 2):
        (tmp_path / f"{version}").write_bytes(onnx_models.affine(float(version)))
        process.say(wire.LoadModel(id=version, name="m", version=version, path=str(tmp_path / f"{version}")))
        assert process.receive() == wire.ModelLoaded(id=version)
    process.say(wire.SwitchModel(id=1))
    process.say(wire.ForgetModel(id=2))
    process.say(wire.SetReady(ready=True))
    process.say(wire.LoadModel(id=3, name="m", version=3, path=str(tmp_path / "none")))
    note = process.receive()
    assert (note.model, note.version, note.facts, note.profile_ms["device"] > 0) == ("m", 1, {}, True)
    assert "none" in process.receive().error
    assert infer(process.url, 1).json()["outputs"][0]["data"] == [2.0, 3.0, 4.0]
    process.say(wire.DropModel(name="m"))
    process.say(wire.LoadModel(id=4, name="m", version=3, path=str(tmp_path / "none")))
    process.receive()  # so that the drop was read
    assert infer(process.url).status_code == 404


def test_sigterm_ends_it_in_order(process):
    process.say(wire.StartServing(log_level=20))
    process.receive()
    assert httpx.get(f"{process.url}/v2/health/live", trust_env=False).status_code == 200
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(30) == 0


def test_an_agent_that_hangs_up_ends_it(process):
    process.say(wire.StartServing(log_level=20))
    process.receive()
    process.hang_up()
    assert process.popen.wait(30) == 0
