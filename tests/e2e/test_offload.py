"""A split model on real processes: one device at the cloud, one below a region, a stage server; then each is killed.

Every answer is compared with what the whole model, or the fall-back that it names, computes of the same inputs.
"""

from __future__ import annotations

import json
import threading
import time

import httpx
import numpy as np
import pytest

from edgefl.local_fleet import free_ports
from edgefl.models.session import new_session
from tests.edgefl.offload.graphs import node, value, weight, write

WITHIN_S = 300.0
OUTPUT = value("y", ("n", 3))
CONFIDENCE = 0.9  # of the cascade


def write_models(folder, seed):
    """Write y = relu(x a) b and a small model; return their sessions."""
    nodes = [node("MatMul", "x a", "xa"), node("Relu", "xa", "h"), node("MatMul", "h b", "y")]
    weights = [weight("a", 4, 4, seed=seed), weight("b", 4, 3, seed=seed + 1)]
    whole = write(folder / f"net-{seed}.onnx", nodes, ["x"], [OUTPUT], weights)
    small = write(folder / f"small-{seed}.onnx", [node("MatMul", "x c", "y")], ["x"], [OUTPUT], [weight("c", 4, 3)])
    return {"whole": new_session(whole), "fallback": new_session(small)}


class Client:
    """Asks one device, checks each answer, and notes who gave it."""

    def __init__(self, fleet, name) -> None:
        self._fleet, self._name = fleet, name
        self.models, self.num_sure, self._rows = {}, 0, np.random.default_rng(0)

    def ask(self):
        """Return who answered and why, or None while the device cannot be reached."""
        x = self._rows.normal(size=(2, 4)).astype(np.float32)
        tensor = {"name": "x", "datatype": "FP32", "shape": [2, 4], "data": x.ravel().tolist()}
        try:
            url = (self._fleet.folder / self._name / "serving").read_text()
            response = httpx.post(f"{url}/v2/models/net/infer", json={"inputs": [tensor]}, timeout=60)
        except (OSError, httpx.TransportError):
            return None
        if response.status_code in {404, 503}:  # it is not there yet, or is loading
            return None
        answer = response.json()
        assert response.status_code == 200, answer
        by, rows = answer["parameters"]["placement"], answer["parameters"].get("cascade_rows", 0)
        whole, small = (self.models[name].run(["y"], {"x": x})[0] for name in ("whole", "fallback"))
        sure = np.exp(small - small.max(1, keepdims=True))
        sure = 1 / sure.sum(1) >= CONFIDENCE
        if by == "fallback":
            wanted = small
        elif "cascade_rows" in answer["parameters"]:
            assert rows == sure.sum() < 2
            wanted = np.where(sure[:, None], small, whole)
        else:
            wanted = whole
        np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (2, 3)), wanted, rtol=1e-4, atol=1e-4)
        self.num_sure += rows
        return by, answer["parameters"].get("fallback_reason", "")

    def until(self, by, words=""):
        """Ask until this one answers; return the reason of the last answer."""
        end_s = time.monotonic() + WITHIN_S
        while (found := self.ask()) is None or found[0] != by or words not in found[1]:
            assert time.monotonic() < end_s, f"{self._name} never answered by {by} {words!r}: {found}"
            time.sleep(0.05)
        return found[1]


class Stream(threading.Thread):
    """Asks a device all the time, until it is stopped; an answer that is wrong ends it with its error."""

    def __init__(self, client) -> None:
        super().__init__(daemon=True)
        self._client, self._over, self.error = client, threading.Event(), None

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self._client.ask()
        except AssertionError as error:
            self.error = error

    def stop(self) -> None:
        self._over.set()
        self.join(WITHIN_S)
        if self.error is not None:
            raise self.error


@pytest.fixture
def split(builtin_fleet, tmp_path):
    """A fleet with a region, two devices and a function that starts a stage server."""
    fleet = builtin_fleet
    fleet.start_region("north")
    (port,) = free_ports(1)
    for name, region in (("near", ""), ("far", "north")):
        fleet.enroll(name, region=region)
        fleet.start_agent(name).wait_for("mqtt.up")
    servers = []

    def serve(version):
        servers.append(
            fleet.spawn("stages.log", "cloud", "stages", f"net:{version}", "--home", fleet.home, "--port", port)
        )
        servers[-1].wait_for("stages.ready")
        return servers[-1]

    def publish(seed, *more):
        models = write_models(tmp_path, seed)
        fleet.command(
            "offload", "publish", tmp_path / f"net-{seed}.onnx", "--name", "net", "--cut", "split:Relu_h",
            "--fallback", tmp_path / f"small-{seed}.onnx", "--stages", f"127.0.0.1:{port}", "--within", "5s",
            "--format", "fp32", *more,
            timeout_s=WITHIN_S,
        )  # fmt: skip
        return models

    yield fleet, serve, publish
    for one in servers:
        one.stop()


@pytest.mark.timeout(1800)
def test_a_split_release_through_everything_that_may_happen(split) -> None:
    fleet, serve, publish = split
    first = publish(1)
    server = serve(1)
    fleet.command("rollout", "start", "net", "--wait", 200, timeout_s=WITHIN_S)
    near, far = clients = [Client(fleet, name) for name in ("near", "far")]
    for one in clients:
        one.models = first
        one.until("split:Relu_h")
        held = {path.name for path in (fleet.folder / one._name / "models" / "net" / "a").iterdir()}
        assert "model.onnx" not in held  # the whole model never came here
        assert {"head-2.onnx", "fallback.onnx"} <= held

    streams = [Stream(one) for one in clients]
    for one in streams:
        one.start()
    server.kill()
    for one in clients:
        assert "UNAVAILABLE" in one.until("fallback")
    server = serve(1)
    for one in clients:
        one.until("split:Relu_h")
    status = json.loads(fleet.command("agent", "status", "--home", fleet.folder / "near", "--json", "-"))
    assert status["placements"]["net"].startswith("split:Relu_h ")

    fleet.cloud.kill()  # predictions need no cloud: head here, tail there
    for one in clients:
        one.until("split:Relu_h")
    fleet.start_cloud()

    fleet.agents["near"].kill()
    fleet.start_agent("near").wait_for("release.serves")
    near.until("split:Relu_h")
    far.until("split:Relu_h")
    for one in streams:
        one.stop()

    second = publish(5)
    fleet.command("rollout", "start", "net", "--to", "name:far", "--wait", 200, timeout_s=WITHIN_S)
    far.models = second
    assert "has another release" in far.until("fallback", "another release")  # the tail is of version 1
    near.until("split:Relu_h")
    server.stop()
    server = serve(2)
    far.until("split:Relu_h")
    near.until("fallback", "another release")
    fleet.command("rollout", "start", "net", "--version", 1, "--rollback", "--to", "name:far", "--wait", 200,
                  timeout_s=WITHIN_S)  # fmt: skip
    far.models = first
    far.until("fallback", "another release")


@pytest.mark.timeout(1800)
def test_a_device_s_own_placement_and_stage_servers(split) -> None:
    """An agent's options win over the release's: a placement that the release lacks is refused in words."""
    fleet, serve, publish = split
    models = publish(1)
    serve(1)
    fleet.agents["near"].stop()
    fleet.start_agent("near", "--stages", "127.0.0.1:1").wait_for("mqtt.up")
    fleet.agents["far"].stop()
    far = fleet.start_agent("far", "--placement", "device")
    far.wait_for("mqtt.up")
    fleet.command("rollout", "start", "net", timeout_s=WITHIN_S)
    far.wait_for("the release has no placement 'device'", WITHIN_S)
    near = Client(fleet, "near")
    near.models = models
    assert "UNAVAILABLE" in near.until("fallback")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "more",
    [("--cascade", CONFIDENCE), ("--whole", "cloud"), ("--whole", "device", "--whole", "cloud")],
    ids=["cascade", "auto", "auto with the device"],
)
def test_kills_in_the_other_modes_cost_no_wrong_answer(split, more) -> None:
    """The stage server, the cloud and the agent are killed while requests come; each answer is what it says it is."""
    fleet, serve, publish = split
    models = publish(1, *more)
    server = serve(1)
    fleet.command("rollout", "start", "net", "--wait", 200, timeout_s=WITHIN_S)
    near, far = clients = [Client(fleet, name) for name in ("near", "far")]
    for one in clients:
        one.models = models
        until_the_model(one)
    streams = [Stream(one) for one in clients]
    for one in streams:
        one.start()
    for _ in range(2):
        server.kill()
        if "device" not in more:  # else it has the whole model
            near.until("fallback", "UNAVAILABLE")
            far.until("fallback", "UNAVAILABLE")
        server = serve(1)
        until_the_model(near)
        until_the_model(far)
    fleet.cloud.kill()
    until_the_model(near)
    until_the_model(far)
    fleet.start_cloud()
    fleet.agents["near"].kill()
    fleet.start_agent("near").wait_for("release.serves")
    until_the_model(near)
    until_the_model(far)
    for one in streams:
        one.stop()
    assert [bool(one.num_sure) for one in clients] == ["--cascade" in more] * 2


def until_the_model(client):
    """Ask until the whole model has answered, wherever it runs."""
    end_s = time.monotonic() + WITHIN_S
    while (found := client.ask()) is None or found[0] == "fallback":
        assert time.monotonic() < end_s, f"only the fall-back answers: {found}"
        time.sleep(0.05)
