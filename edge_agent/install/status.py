"""The status of an agent, read from its home; works whether or not the agent runs."""

from __future__ import annotations

import datetime
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edge_agent.link.log_sender import LOG_FILE
from edge_agent.link.parents import listed_names, parent_name
from edge_agent.link.profile import SERVING_FILE, load_profile
from edge_agent.live import LiveState, read_live
from edge_agent.releases.slots import installed_models
from edgefl.errors import HomeError
from edgefl.process.home import home_holder
from edgefl.process.log_tail import read_tail
from edgefl.protocols import tls

_FAULT = re.compile(r"^\S+ \S+ (?:WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """The status of an agent at one time."""

    device: str
    running: bool
    pid: int  # 0 while it does not run
    since: str  # ISO 8601, UTC; empty while it does not run
    healthy: bool  # it runs and reaches the cloud
    cloud: str
    connected: bool  # it reaches the cloud by gRPC
    broker: str
    broker_fault: str  # why it has no connection to the broker; without one, it polls the cloud by gRPC
    parents: list[str]  # where it may connect, in this order
    parent: str  # that is in use; empty while it does not run
    parent_since: str  # ISO 8601, UTC; empty while it does not run
    training: str  # job and round that it works for now; empty = none
    policy: str  # when it works for the fleet; empty = always, or it does not run
    policy_refuses: str  # why it does not work now, by its policy; empty = it does
    serving_url: str  # empty while it does not run
    placements: dict[str, str]  # by model that is shared with a stage server: how it is placed now
    models: dict[str, int]  # model -> version that is installed and active
    last_contact: str  # ISO 8601, UTC; empty = never
    last_error: str  # the last warning or error in its log, with its time
    certificate_expires: str  # ISO 8601, UTC; empty without TLS
    outbox_updates: int
    outbox_bytes: int


def read_status(home: Path) -> Status:
    """Read a home without affecting its agent; raises HomeError."""
    profile = load_profile(home)
    serving, contact, cert = home / SERVING_FILE, home / "contact", home / "cert.pem"
    holder = home_holder(home)
    live = None if holder is None else read_live(home, holder.pid)
    updates, size = _outbox(home / "agent.db")
    connected = live is not None and live.cloud_reachable
    return Status(
        device=profile.device,
        running=holder is not None,
        pid=0 if holder is None else holder.pid,
        since="" if holder is None else _iso(holder.since_s),
        healthy=connected,
        cloud=profile.cloud_url,
        connected=connected,
        broker=profile.broker,
        broker_fault="" if live is None else live.broker_fault,
        parents=listed_names(home) or [parent_name(profile)],
        parent="" if live is None else live.parent,
        parent_since="" if live is None or not live.parent_since_s else _iso(live.parent_since_s),
        training=_training(live),
        policy="" if live is None else live.policy,
        policy_refuses="" if live is None else live.policy_refuses,
        serving_url=serving.read_text(encoding="ascii") if holder is not None and serving.exists() else "",
        placements={} if live is None else dict(live.placements),
        models={
            slots.state.model: slots.state.serving.version
            for slots in installed_models(home / "models")
            if slots.state.serving
        },
        last_contact=_iso(contact.stat().st_mtime) if contact.exists() else "",
        last_error=_last_error(home / LOG_FILE),
        certificate_expires=tls.expires(cert.read_bytes()).isoformat() if cert.exists() else "",
        outbox_updates=updates,
        outbox_bytes=size,
    )


def _training(live: LiveState | None) -> str:
    return "" if live is None or not live.training_job else f"{live.training_job} round {live.training_round}"


def _last_error(path: Path) -> str:
    try:
        return next(iter(read_tail(path, 1, lambda line: _FAULT.match(line) is not None).lines), "")
    except OSError:
        return ""


def _outbox(path: Path) -> tuple[int, int]:
    if not path.exists():
        return 0, 0
    try:
        return _count(str(path))
    except sqlite3.OperationalError:  # the disk is full, for the agent or for us: read the file as it is
        try:
            return _count(f"{path.resolve().as_uri()}?immutable=1")
        except sqlite3.OperationalError as cause:
            if "no such table" in str(cause):  # the agent starts for the first time
                return 0, 0
            raise HomeError(f"{path} cannot be read: {cause}") from cause


def _count(database: str) -> tuple[int, int]:
    with closing(sqlite3.connect(database, timeout=1, uri=database.startswith("file:"))) as db:
        count, size = db.execute("SELECT count(*), coalesce(sum(size), 0) FROM outbox").fetchone()
    return int(count), int(size)


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
