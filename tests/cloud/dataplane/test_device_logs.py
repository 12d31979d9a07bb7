"""A device's log on request: who is asked, whose answer counts, how often, and what is said if none comes."""

from __future__ import annotations

import threading

import pytest

from cloud.dataplane.device_logs import MAX_WAITING, DeviceLogs
from edgefl.errors import DeviceUnavailable, ProtocolError
from edgefl.process.log_tail import MAX_BYTES
from edgefl.protocols.messages import DeviceState
from edgefl.testing import ManualClock


class Devices:
    """Devices that answer a command as a test tells them."""

    def __init__(self):
        self.states, self.sent, self.respond = {}, [], lambda _device, _command: None
        self.add("a")

    def add(self, name, *, online=True, commands=("log",)):
        self.states[name] = DeviceState(session=1, online=online, agent_version="0.0", commands=commands)

    def state(self, device):
        return self.states.get(device)

    def send_command(self, device, command):
        self.sent.append((device, command))
        self.respond(device, command)


@pytest.fixture
def devices():
    return Devices()


@pytest.fixture
def clock():
    return ManualClock(0.0)


@pytest.fixture
def logs(devices, clock):
    one = DeviceLogs(devices, answer_s=0.05, clock=clock)
    devices.respond = lambda device, command: one.receive(device, command.request, b"one\n  two", cut=True)
    return one


def test_the_log_of_a_device_comes_back(logs, devices):
    found = logs.fetch("a", 20, "job-1")
    assert (found.lines, found.cut) == (["one", "  two"], True)
    [(device, command)] = devices.sent
    assert (device, command.lines, command.job) == ("a", 20, "job-1")


def test_a_device_that_cannot_answer_is_told_at_once(logs, devices):
    devices.add("off", online=False)
    devices.add("old", commands=())
    for name, said in {"off": "is offline", "none": "is offline", "old": r"agent 0\.0 of device old .* update"}.items():
        with pytest.raises(DeviceUnavailable, match=said):
            logs.fetch(name, 1)
    assert devices.sent == []


def test_a_device_that_does_not_answer_is_told_after_a_time_and_can_be_asked_again(logs, devices, clock):
    answer, devices.respond = devices.respond, lambda _device, _command: None
    with pytest.raises(DeviceUnavailable, match=r"did not send its log within 0\.05 s"):
        logs.fetch("a", 1)
    clock.advance(1)
    devices.respond = answer
    assert logs.fetch("a", 1).lines == ["one", "  two"]


def test_only_the_device_that_was_asked_can_answer_and_once(logs, devices):
    def respond(_device, command):
        logs.receive("b", command.request, b"forged", cut=False)
        logs.receive("a", "another", b"forged", cut=False)
        logs.receive("a", command.request, b"true \xff", cut=False)
        logs.receive("a", command.request, b"too late", cut=False)

    devices.respond = respond
    assert logs.fetch("a", 1).lines == ["true \ufffd"]


def test_a_log_above_the_limit_is_refused(logs):
    with pytest.raises(ProtocolError, match="at most"):
        logs.receive("a", "r", bytes(MAX_BYTES + 1), cut=False)


def test_a_device_is_not_asked_too_often(devices, clock):
    waited = []

    def wait(seconds):
        waited.append(seconds)
        clock.advance(seconds)

    logs = DeviceLogs(devices, clock=clock, wait=wait)
    devices.respond = lambda device, command: logs.receive(device, command.request, b"line", cut=False)
    logs.fetch("a", 1)
    clock.advance(0.25)
    logs.fetch("a", 1)
    devices.add("b")
    logs.fetch("b", 1)
    clock.advance(1)
    logs.fetch("a", 1)
    assert waited == [0, 0.75, 0, 0]


def test_two_requests_for_the_log_of_one_device_do_not_wait_together(devices):
    logs = DeviceLogs(devices)

    def respond(device, command):
        with pytest.raises(DeviceUnavailable, match="is being fetched"):
            logs.fetch(device, 1)
        logs.receive(device, command.request, b"line", cut=False)

    devices.respond = respond
    assert logs.fetch("a", 1).lines == ["line"]


def test_few_requests_wait_at_the_same_time(devices):
    logs = DeviceLogs(devices, answer_s=20)
    entered = threading.Barrier(MAX_WAITING + 1)
    devices.respond = lambda _device, _command: entered.wait(10)
    for number in range(MAX_WAITING + 1):
        devices.add(f"d{number}")
    threads = [threading.Thread(target=logs.fetch, args=(f"d{number}", 1)) for number in range(MAX_WAITING)]
    for thread in threads:
        thread.start()
    entered.wait(10)
    with pytest.raises(DeviceUnavailable, match="logs are being fetched"):
        logs.fetch(f"d{MAX_WAITING}", 1)
    for device, command in devices.sent:
        logs.receive(device, command.request, b"", cut=False)
    for thread in threads:
        thread.join(10)
