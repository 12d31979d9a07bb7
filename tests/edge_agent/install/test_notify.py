"""What systemd hears."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from edge_agent.install.notify import keep_alive, notify, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path, monkeypatch):
    """A notification socket, as systemd has it."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@edgefl-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address.replace("@", "\0"))
        listener.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield listener


def test_states_arrive(systemd):
    assert notify("READY=1")
    assert systemd.recv(100) == b"READY=1"


def test_the_watchdog_is_fed(systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "20000")

    async def run():
        task = asyncio.create_task(keep_alive())
        heard = [await asyncio.to_thread(systemd.recv, 100) for _ in range(3)]
        task.cancel()
        return heard

    assert asyncio.run(run()) == [b"WATCHDOG=1"] * 3


def test_without_systemd_nothing_is_said(monkeypatch):
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    assert not notify("READY=1")
    asyncio.run(keep_alive())


@pytest.mark.parametrize(
    ("limit", "pid", "interval"), [("2000000", None, 1.0), ("2000000", "1", None), ("", None, None), ("x", None, None)]
)
def test_the_watchdog_is_ours_alone(monkeypatch, limit, pid, interval):
    monkeypatch.setenv("WATCHDOG_USEC", limit)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    assert watchdog_interval_s() == interval
