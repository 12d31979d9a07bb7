"""Current resources of the device: CPU, memory, disk, and the battery if there is one."""

from __future__ import annotations

from pathlib import Path

import psutil

from edgefl.protocols.messages import Telemetry

_MB = 1e6


def measure(home: Path) -> Telemetry:
    """Read the system's figures; CPU is the mean since the last call."""
    memory = psutil.virtual_memory()
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return Telemetry(
        cpu_count=psutil.cpu_count() or 1,
        cpu_percent=psutil.cpu_percent(),
        load_1m=psutil.getloadavg()[0],
        ram_total_mb=memory.total / _MB,
        ram_available_mb=memory.available / _MB,
        disk_free_mb=psutil.disk_usage(str(home)).free / _MB,
        battery_percent=float(battery.percent) if battery else None,
        on_mains=battery.power_plugged if battery else None,
    )


def default_memory_limit_mb() -> int:
    """Return the default memory limit for training: three quarters of the machine's memory."""
    return int(psutil.virtual_memory().total * 0.75) >> 20


def default_serving_memory_mb() -> int:
    """Return the default memory limit for the serving process: a third of the machine's memory."""
    return int(psutil.virtual_memory().total / 3) >> 20
