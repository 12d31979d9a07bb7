"""Tells systemd that the agent is ready, alive, or stopping (sd_notify(3)): one datagram, no library."""

from __future__ import annotations

import asyncio
import os
import socket


def notify(state: str) -> bool:
    """Send a state such as `READY=1`; returns False if systemd does not expect it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # a name in Linux's abstract namespace
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), address)
    return True


def watchdog_interval_s() -> float | None:
    """Return the interval for watchdog messages (half of systemd's limit); None if there is no watchdog for us."""
    limit_us = os.environ.get("WATCHDOG_USEC", "")
    meant_for = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not limit_us.isdecimal() or meant_for != str(os.getpid()):
        return None
    return int(limit_us) / 2e6


async def keep_alive() -> None:
    """Tell the watchdog that the event loop runs, until cancelled; returns at once without a watchdog."""
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
