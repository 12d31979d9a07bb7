"""The status of a cloud, for `edgefl cloud status`: from its home, and from the cloud itself if it runs."""

from __future__ import annotations

import datetime
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgefl.errors import EdgeflError
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.credentials import FILE
from edgefl.process.home import check_home, home_holder
from edgefl.protocols import tls


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudStatus:
    """The status of a cloud at one time."""

    home: str
    running: bool
    pid: int  # 0 while it does not run
    since: str  # ISO 8601, UTC; empty while it does not run
    healthy: bool  # it runs, answers, and each of its parts is healthy
    fault: str  # why it is not healthy; empty if it is
    url: str  # of operators, and of devices that enrol
    disk_free_mb: float
    certificate_expires: str  # ISO 8601, UTC; empty if there is none yet
    ca_expires: str
    version: str = ""  # the rest is known only while it runs
    broker: str = ""  # mosquitto (the cloud's child), builtin, or external
    parts: dict[str, str] = field(default_factory=dict)  # part -> why it is not healthy; empty = it is
    ports: dict[str, int] = field(default_factory=dict)
    devices: dict[str, int] = field(default_factory=dict)  # known, online
    jobs: dict[str, int] = field(default_factory=dict)  # running, queued


def read_cloud_status(home: Path) -> CloudStatus:
    """Read a home and ask its cloud; raises HomeError if the folder is no home of a cloud."""
    check_home(home, "cloud")
    holder = home_holder(home)
    live: dict[str, Any] = {}
    fault = "it does not run"
    credentials = home / FILE
    url = load_credentials(credentials).url if credentials.exists() else ""
    if holder is not None:
        try:
            with CloudClient(None, load_credentials(credentials)) as client:
                live = client.status()
        except EdgeflError as error:
            fault = f"it does not answer: {error}"
        else:
            reasons = {name: reason for name, reason in live["parts"].items() if reason}
            fault = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return CloudStatus(
        home=str(home),
        running=holder is not None,
        pid=0 if holder is None else holder.pid,
        since="" if holder is None else _iso(datetime.datetime.fromtimestamp(holder.since_s, datetime.UTC)),
        healthy=not fault,
        fault=fault,
        url=url,
        disk_free_mb=shutil.disk_usage(home).free / 1e6,
        certificate_expires=_expires(home / "tls" / "cert.pem"),
        ca_expires=_expires(home / "tls" / "ca.pem"),
        **{name: live[name] for name in ("version", "broker", "parts", "ports", "devices", "jobs") if name in live},
    )


def _expires(certificate: Path) -> str:
    return _iso(tls.expires(certificate.read_bytes())) if certificate.exists() else ""


def _iso(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="seconds")
