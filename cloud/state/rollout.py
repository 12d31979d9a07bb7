"""Rollouts: which release each device should serve, and its progress.

A device has one row per model. Its sequence number grows with every rollout that includes the device, so that the
device can tell a new `Desired` from an old one that is sent again. A removed device keeps its row for that reason.
Invariant: a rollout changes all of its devices or none, and lowers a version only with `rollback`.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud.state.enrolment import REMOVED, EnrolledDevice
from cloud.state.registry import Registry
from cloud.state.store import desired, rollouts
from edgefl.errors import ConfigError, ManifestRejected, NotFound, ProtocolError
from edgefl.protocols.manifest import Desired, Release, sign
from edgefl.protocols.messages import RolloutNote, Signed, from_json

PROGRESS = ("pending", "downloading", "installed", "active")
FAILED = "failed"
MAX_DETAIL_CHARS = 500

SendDesired = Callable[[str, Signed], None]
Rows = list[dict[str, Any]]
Documents = list[Signed]


class Rollouts:
    """All rollouts of a fleet. Methods may be called from any thread."""

    def __init__(
        self, engine: sa.Engine, registry: Registry, fleet_key: Ed25519PrivateKey, *,
        devices: Callable[[], Sequence[EnrolledDevice]], send_desired: SendDesired,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._registry = registry
        self._key = fleet_key
        self._devices = devices
        self._send = send_desired
        self._clock = clock
        self._changed = threading.Condition()  # also serializes changes of the table
        self._revision = 0

    def start(
        self, model: str, version: int | None = None, to: Collection[str] = ("all",), *, rollback: bool = False
    ) -> str:
        """Tell devices to serve a version (by default the newest), and return the rollout's id.

        `to` holds "all", "TAG=VALUE" and "name:DEVICE". Raises NotFound, ConfigError, ManifestRejected.
        """
        release = self._registry.release(model, version)
        names = select_devices(self._devices(), to)
        rollout = f"rollout-{secrets.token_hex(4)}"
        facts = {"model": model, "version": release.version, "rollback": rollback, "created_s": self._clock()}
        with self._changed:
            with self._engine.begin() as db:
                before = _rows(db, model, names)
                if not rollback:
                    _refuse_older(release, before)
                db.execute(rollouts.insert().values(facts | {"id": rollout}))
                documents = {name: self._sign(name, release, before.get(name), rollback=rollback) for name in names}
                for name, signed in documents.items():
                    _put(db, rollout, release, before.get(name), name, signed)
            self._notify()
        for name, signed in documents.items():
            self._send(name, signed)
        return rollout

    def note(self, device: str, note: RolloutNote) -> None:
        """Record a device's report; a report of another version, or a repeated one, changes nothing."""
        if note.state not in {*PROGRESS, FAILED}:
            known = ", ".join([*PROGRESS, FAILED])
            raise ProtocolError(f"rollout state {note.state[:80]!r} of {device!r} is not one of: {known}")
        here = (desired.c.device == device) & (desired.c.model == note.model) & (desired.c.version == note.version)
        if note.state in PROGRESS:
            here &= desired.c.state.in_([*PROGRESS[: PROGRESS.index(note.state)], FAILED])
        self._update(here, note.state, note.detail[:MAX_DETAIL_CHARS])

    def forget(self, device: str) -> None:
        """Note that a device was removed, so that a new device of the same name does not get its releases."""
        self._update(desired.c.device == device, FAILED, REMOVED)

    def status(self, rollout: str) -> dict[str, Any]:
        """Return a rollout with its devices, without those that a later rollout includes."""
        of_rollout = desired.select().where(desired.c.rollout == rollout).order_by(desired.c.device)
        with self._engine.connect() as db:
            row = db.execute(rollouts.select().where(rollouts.c.id == rollout)).mappings().one_or_none()
            found = db.execute(of_rollout).mappings().all()
        if row is None:
            raise NotFound(f"there is no rollout {rollout!r}")
        members = [{"device": one["device"], "state": one["state"], "detail": one["detail"]} for one in found]
        return {**row, "state": overall({one["state"] for one in members}), "devices": members}

    def list(self) -> Rows:
        """Return all rollouts, the newest first."""
        with self._engine.connect() as db:
            ids = db.scalars(sa.select(rollouts.c.id).order_by(rollouts.c.created_s.desc())).all()
        return [self.status(one) for one in ids]

    def desired_for(self, device: str) -> Documents:
        """Return the `Desired` documents of a device, one per model."""
        its_own = (desired.c.device == device) & ((desired.c.state != FAILED) | (desired.c.detail != REMOVED))
        with self._engine.connect() as db:
            found = db.scalars(sa.select(desired.c.signed).where(its_own)).all()
        return [from_json(Signed, signed) for signed in found]

    def wait(self, seen: int, timeout_s: float) -> int:
        """Wait until any rollout has changed since revision `seen`, and return the revision now."""
        with self._changed:
            self._changed.wait_for(lambda: self._revision != seen, timeout_s)
            return self._revision

    def _sign(self, device: str, release: Release, before: Mapping[str, Any] | None, *, rollback: bool) -> Signed:
        sequence = before["sequence"] + 1 if before else 1
        return sign(Desired(device=device, release=release, sequence=sequence, rollback=rollback), self._key)

    def _update(self, where: sa.ColumnElement[bool], state: str, detail: str) -> None:
        with self._changed:
            with self._engine.begin() as db:
                changed = db.execute(desired.update().where(where).values(state=state, detail=detail)).rowcount
            if changed:
                self._notify()

    def _notify(self) -> None:
        self._revision += 1
        self._changed.notify_all()


def select_devices(devices: Sequence[EnrolledDevice], to: Collection[str]) -> list[str]:
    """Return the names that match any selector; raises ConfigError if a selector matches none."""
    chosen: set[str] = set()
    for selector in to:
        names = {device.name for device in devices if _matches(device, selector)}
        if not names:
            enrolled = ", ".join(device.name for device in devices) or "none"
            raise ConfigError(f"no device matches {selector[:80]!r}; enrolled devices: {enrolled}")
        chosen |= names
    return sorted(chosen)


def overall(states: Collection[str]) -> str:
    """Return running | failed | done, or superseded if no device is left in the rollout."""
    if not states:
        return "superseded"
    if set(states) - {"active", FAILED}:
        return "running"
    return FAILED if FAILED in states else "done"


def _matches(device: EnrolledDevice, selector: str) -> bool:
    if selector == "all":
        return True
    if selector.startswith("name:"):
        return device.name == selector.removeprefix("name:")
    key, equals, value = selector.partition("=")
    if not equals:
        raise ConfigError(f"{selector[:80]!r} is not a selector of devices; expected all, TAG=VALUE or name:DEVICE")
    return device.tags.get(key) == value


def _rows(db: sa.Connection, model: str, names: Collection[str]) -> dict[str, Mapping[str, Any]]:
    found = db.execute(desired.select().where(desired.c.model == model)).mappings()
    return {row["device"]: dict(row) for row in found if row["device"] in set(names)}


def _refuse_older(release: Release, before: Mapping[str, Mapping[str, Any]]) -> None:
    ours = {name: row for name, row in before.items() if row["detail"] != REMOVED}  # else of another device
    newer = {name: row["version"] for name, row in ours.items() if row["version"] > release.version}
    if newer:
        shown = ", ".join(f"{name} (version {version})" for name, version in sorted(newer.items())[:5])
        raise ManifestRejected(
            f"{release.model} version {release.version} is older than what {len(newer)} devices are to serve: {shown}. "
            "Nothing was changed; use --rollback to install an older version."
        )


def _put(
    db: sa.Connection, rollout: str, release: Release, before: Mapping[str, Any] | None, device: str, signed: Signed
) -> None:
    # A device that serves this very version already has nothing more to report.
    serves_it = before is not None and before["version"] == release.version and before["state"] == "active"
    row = {
        "rollout": rollout,
        "version": release.version,
        "sequence": before["sequence"] + 1 if before else 1,
        "signed": dataclasses.asdict(signed),
        "state": "active" if serves_it else "pending",
        "detail": "",
    }
    here = (desired.c.device == device) & (desired.c.model == release.model)
    if before:
        db.execute(desired.update().where(here).values(row))
    else:
        db.execute(desired.insert().values(row | {"device": device, "model": release.model}))
