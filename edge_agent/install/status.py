"""The status of an agent, read from its home; works whether or not the agent runs."""

from __future__ import annotations

import datetime
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edge_agent.link.profile import SERVING_FILE, load_profile
from edge_agent.releases.slots import installed_models
from edgefl.process.home import home_in_use
from edgefl.protocols import tls


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """The status of an agent at one time."""

    device: str
    running: bool
    cloud: str
    broker: str
    serving_url: str  # empty while it does not run
    last_contact: str  # ISO 8601, UTC; empty = never
    certificate_expires: str  # ISO 8601, UTC; empty without TLS
    models: dict[str, int]  # model -> version that is installed and active
    outbox_updates: int
    outbox_bytes: int


def read_status(home: Path) -> Status:
    """Read a home without affecting its agent; raises HomeError."""
    profile = load_profile(home)
    serving, contact, cert = home / SERVING_FILE, home / "contact", home / "cert.pem"
    running = home_in_use(home)
    updates, size = _outbox(home / "agent.db")
    return Status(
        device=profile.device,
        running=running,
        cloud=profile.cloud_url,
        broker=profile.broker,
        serving_url=serving.read_text(encoding="ascii") if running and serving.exists() else "",
        last_contact=_iso(contact.stat().st_mtime) if contact.exists() else "",
        certificate_expires=tls.expires(cert.read_bytes()).isoformat() if cert.exists() else "",
        models={
            slots.state.model: slots.state.serving.version
            for slots in installed_models(home / "models")
            if slots.state.serving
        },
        outbox_updates=updates,
        outbox_bytes=size,
    )


def _outbox(path: Path) -> tuple[int, int]:
    if not path.exists():
        return 0, 0
    try:
        return _count(str(path))
    except sqlite3.OperationalError:  # the disk is full, for the agent or for us: read the file as it is
        return _count(f"{path.resolve().as_uri()}?immutable=1")


def _count(database: str) -> tuple[int, int]:
    with closing(sqlite3.connect(database, timeout=1, uri=database.startswith("file:"))) as db:
        count, size = db.execute("SELECT count(*), coalesce(sum(size), 0) FROM outbox").fetchone()
    return int(count), int(size)


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
