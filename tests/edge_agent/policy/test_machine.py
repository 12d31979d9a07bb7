"""The machine's state: by real programs, a real trainer's load, and a tree like /sys."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from edge_agent.policy.machine import Machine

ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
wlan0 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0
{name} 00000000 0101A8C0 0003 0 0 100 00000000 0 0 0
{name} 0001A8C0 00000000 0001 0 0 100 00FFFFFF 0 0 0
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH on which there are only the programs that a test adds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name, prints, status=0):
        path = folder / name
        path.write_text(f"#!/bin/sh\nprintf '%b' '{prints}'\nexit {status}\n")
        path.chmod(0o755)

    return add


def machine(root, name="", kind="1", uevent="", *, wireless=False):
    if name:
        (root / "proc/net").mkdir(parents=True)
        (root / "proc/net/route").write_text(ROUTES.format(name=name))
        folder = root / "sys/class/net" / name
        folder.mkdir(parents=True)
        (folder / "type").write_text(f"{kind}\n")
        (folder / "uevent").write_text(f"INTERFACE={name}\n{uevent}")
        if wireless:
            (folder / "wireless").mkdir()
    return Machine(lambda: None, root)


@pytest.mark.parametrize(("answer", "metered"), [("u 1", True), ("u 2", False), ("u 3", True), ("u 4", False)])
def test_network_manager_is_asked_first(tmp_path, programs, answer, metered):
    programs("busctl", answer + r"\n")
    assert machine(tmp_path, "wlan0", uevent="DEVTYPE=wlan\n").metered() == (metered, "")


def test_nmcli_is_asked_next(tmp_path, programs):
    programs("busctl", "u 0")
    programs("nmcli", r"no (guessed)\n\nunknown\nyes\n")
    assert machine(tmp_path).metered() == (True, "")
    programs("nmcli", r"no\nunknown\n")
    assert machine(tmp_path).metered() == (False, "")


@pytest.mark.parametrize(
    ("facts", "metered"),
    [
        ({"name": "eth0"}, False),
        ({"name": "wwan0", "kind": "65534", "uevent": "DEVTYPE=wwan\n"}, True),
        ({"name": "ppp0", "kind": "512"}, True),
        ({"name": "wlp2s0", "uevent": "DEVTYPE=wlan\n"}, None),
        ({"name": "wlp2s0", "wireless": True}, None),
        ({"name": "tun0", "kind": "65534"}, None),
        ({}, None),
    ],
)
def test_without_network_manager_the_interface_is_judged(tmp_path, programs, facts, metered):
    programs("busctl", "no such service", status=1)
    found, why = machine(tmp_path, **facts).metered()
    assert found is metered
    assert bool(why) is (metered is None)


@pytest.mark.parametrize(("plugged", "on_mains"), [(True, True), (False, False), (None, None)])
def test_the_battery(tmp_path, programs, monkeypatch, plugged, on_mains):
    answer = SimpleNamespace(percent=50, secsleft=100, power_plugged=plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: answer, raising=False)
    state = machine(tmp_path, "eth0").measure()
    assert (state.on_mains, "charging" in state.unknown) == (on_mains, plugged is None)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert machine(tmp_path).measure().on_mains is True


def test_the_trainers_own_work_is_not_that_of_others(tmp_path):
    """A child that computes: as the trainer it is left out, as another program it is counted."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            as_trainer, as_other = Machine(lambda: child.pid, tmp_path), Machine(lambda: None, tmp_path)
            before_s = psutil.Process(child.pid).cpu_times().user
            while psutil.Process(child.pid).cpu_times().user < before_s + 0.5:
                time.sleep(0.05)
            others, everyone = as_trainer.measure().busy_percent, as_other.measure().busy_percent
        finally:
            child.kill()
    assert others is not None
    assert everyone is not None
    assert others < everyone
