"""What predictions may do to a device: crash, hang, eat its memory, talk in halves. The agent and the others go on."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.publish import publish_onnx
from edgefl.operator.run import upload_file
from tests import onnx_models

LEAST = -(2**31)
WAIT_S = 60.0
LIVE_S = 1.0  # on a busy machine; alone it takes a millisecond


def trials(agent):
    return [one for one in agent.children() if "edge_agent.releases.trial" in one.cmdline()]


class Devices:
    """Three devices of a fleet; attacks are on `a`."""

    def __init__(self, fleet, folder) -> None:
        self.fleet, self.folder = fleet, folder
        self.client = CloudClient(fleet.url, load_credentials(fleet.credentials))

    def release(self, name, content, *, wait="active", is_tried=True):
        """Publish a model for device a; wait until it is there, or failed. Older clients publish what they have not
        tried, and without a sample."""
        path = self.folder / f"{name}-{time.monotonic_ns()}.onnx"
        path.write_bytes(content)
        if is_tried:
            version = publish_onnx(self.client, name, path)["version"]
        else:
            version = self.client.publish(name, upload_file(self.client, path), {})["version"]
        self.roll_out(name, version, wait=wait)
        return version

    def roll_out(self, name, version, *, wait="active", rollback=False):
        rollout = self.client.start_rollout(name, version, ("name:a",), rollback=rollback)["id"]
        if wait:
            self.until(lambda: self.state(rollout)["state"] in {"active", "failed"}, f"an end of {name} {version}")
            assert self.state(rollout)["state"] == wait, self.state(rollout)
        return rollout

    def state(self, rollout):
        [device] = self.client.rollout(rollout)["devices"]
        return device

    @property
    def url(self):
        return (self.fleet.folder / "a" / "serving").read_text()

    @property
    def agent(self):
        return psutil.Process(self.fleet.agents["a"].pid)

    def serving_pid(self):
        found = [one.pid for one in self.agent.children() if "edge_agent.serving.serving_main" in one.cmdline()]
        return found[0] if found else None

    def ask(self, name, **inputs):
        tensors = [
            {"name": key, "shape": shape, "datatype": datatype, "data": data}
            for key, (datatype, shape, data) in inputs.items()
        ]
        return httpx.post(
            f"{self.url}/v2/models/{name}/infer", json={"inputs": tensors}, timeout=WAIT_S, trust_env=False
        )

    def affine(self, name="affine"):
        return self.ask(name, x=("FP32", [1, 3], [1.0, 1.0, 1.0]))

    def predicts(self, value, name="affine"):
        """A prediction is right, at the latest once the process is there again."""

        def right():
            with contextlib.suppress(httpx.TransportError, OSError):
                answer = self.affine(name)
                return answer.status_code == 200 and answer.json()["outputs"][0]["data"] == [value] * 3
            return False

        self.until(right, f"{name} says {value}")

    def until(self, condition, what):
        end_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end_s, f"{what} did not happen; the log ends with {self.log()[-2000:]}"
            time.sleep(0.05)

    def log(self):
        return self.fleet.agents["a"].log.read_text()


@pytest.fixture
def devices(embedded_fleet, three, tmp_path):
    three(embedded_fleet)
    one = Devices(embedded_fleet, tmp_path)
    with one.client:
        one.release("affine", onnx_models.affine())
        one.predicts(3.0)
        yield one
    assert one.agent.is_running()
    assert "Traceback" not in one.log(), one.log()[-6000:]


def test_a_crash_in_a_native_kernel_and_kill_9(devices, round_is_right):
    devices.release("divider", onnx_models.divider())
    for _ in range(2):
        with pytest.raises(httpx.TransportError):
            devices.ask("divider", a=("INT32", [1, 1], [LEAST]), b=("INT32", [1, 1], [-1]))
        devices.predicts(3.0)
    assert "SIGFPE" in devices.log()
    killed = devices.serving_pid()
    os.kill(killed, signal.SIGKILL)
    devices.predicts(3.0)
    devices.until(
        lambda: devices.ask("divider", a=("INT32", [1, 1], [9]), b=("INT32", [1, 1], [2])).status_code == 200,
        "the divider",
    )
    assert devices.serving_pid() != killed
    round_is_right(devices.fleet)


def test_releases_that_crash_or_never_end_while_they_load(devices, round_is_right):
    rollout = devices.release("affine", onnx_models.crash_at_start(), wait="failed", is_tried=False)
    assert rollout
    devices.predicts(3.0)
    hanging = devices.release("slow", onnx_models.endless_start(), wait=None, is_tried=False)
    devices.until(lambda: trials(devices.agent), "the trial")
    devices.release("quick", onnx_models.affine(4.0))  # nobody waits for the slow one
    devices.predicts(5.0, "quick")
    good = devices.release("slow", onnx_models.affine(6.0))  # a newer wish ends the work on the older
    devices.predicts(7.0, "slow")
    assert good == hanging + 1
    devices.roll_out("slow", hanging, wait=None, rollback=True)
    devices.until(lambda: trials(devices.agent), "the trial")
    devices.roll_out("slow", good)  # out of a hanging rollback
    devices.predicts(7.0, "slow")
    round_is_right(devices.fleet)


def test_one_damaged_state_costs_that_model_until_it_is_sent_again(devices, round_is_right):
    devices.release("other", onnx_models.affine(9.0))
    devices.fleet.agents["a"].kill()
    (devices.fleet.folder / "a" / "models" / "affine" / "state.json").write_text('{"model": "aff')
    devices.fleet.restart_agent("a", delta=1.0, weight=1, calls=devices.folder / "a.calls")
    devices.predicts(10.0, "other")
    devices.predicts(3.0)
    assert "release.state_damaged model=affine" in devices.log()
    round_is_right(devices.fleet)


def test_a_request_that_asks_for_all_memory(devices, round_is_right):
    devices.fleet.agents["a"].stop()
    options = ("--data", "delta=1.0", "--data", "weight=1", "--data", f"calls={devices.folder / 'a.calls'}")
    devices.fleet.start_agent("a", *options, "--serve-memory-mb", "1500").wait_for("mqtt.up")
    devices.release("outer", onnx_models.outer())
    before = devices.agent.memory_info().rss
    for _ in range(3):
        numbers = [1.0] * 117_000  # 468 kB as FP32; 55 GB of pairs
        with contextlib.suppress(httpx.TransportError):
            answer = devices.ask("outer", x=("FP32", [len(numbers)], numbers))
            assert answer.status_code in {400, 503}
            assert "error" in answer.json()
        devices.predicts(3.0)
    assert devices.agent.memory_info().rss < before + 20e6
    round_is_right(devices.fleet)


def test_half_sent_headers_and_bodies_by_the_hundred(devices, round_is_right):
    address = urlsplit(devices.url)
    halves = (b"POST /v2/models/affine/infer HTTP/1.1\r\nhos", b"", b"GET / HTTP/1.1\r\nhost: x\r\n",
              b"POST /v2/models/affine/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{")  # fmt: skip
    with contextlib.ExitStack() as held:
        for number in range(1200):
            with contextlib.suppress(OSError):
                half = held.enter_context(socket.create_connection((address.hostname, address.port), timeout=WAIT_S))
                half.sendall(halves[number % len(halves)])
        for _ in range(20):
            answer = devices.affine()
            assert (answer.status_code, answer.json()["outputs"][0]["data"]) == (200, [3.0] * 3)
        round_is_right(devices.fleet)


def test_live_is_answered_whatever_is_computed(devices, round_is_right):
    devices.release("counter", onnx_models.counter())
    large = json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [0.5] * 4_000_000}]})
    stop = threading.Event()

    def compute(send):
        while not stop.is_set():
            with contextlib.suppress(httpx.TransportError):
                send()

    slow = [
        threading.Thread(target=compute, args=(lambda: devices.ask("counter", times=("INT64", [], [3_000_000])),))
        for _ in range(3)
    ]
    slow.append(
        threading.Thread(
            target=compute,
            args=(
                lambda: httpx.post(
                    f"{devices.url}/v2/models/affine/infer", content=large, timeout=WAIT_S, trust_env=False
                ),
            ),
        )
    )
    for thread in slow:
        thread.start()
    try:
        with httpx.Client(base_url=devices.url, trust_env=False, timeout=LIVE_S) as client:
            for _ in range(100):  # each within its time-out
                assert client.get("/v2/health/live").json() == {"live": True}
                time.sleep(0.02)
    finally:
        stop.set()
        for thread in slow:
            thread.join(2 * WAIT_S)
    devices.predicts(3.0)
    round_is_right(devices.fleet)
