"""Enrolment: which devices belong to the fleet, and how a device is admitted.

A token is 32 random bytes, valid once and for a limited time. The database keeps only their SHA-256, so that the
timing of a lookup reveals nothing, and a stolen database has no tokens.
Invariant: a token is used, a device added and its certificate made in one transaction, or nothing is.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from cloud.state.enrolment_tokens import check_token_label
from cloud.state.store import SERIAL_OF, devices, revoked, tokens, updates
from cloud.trust.crl import make_crl
from cloud.trust.renewal import Renewals, forget_next
from edgefl.errors import ConfigError, EnrolmentRefused, NotFound
from edgefl.protocols.tls import (
    CLOUD_NAME,
    DEVICE_DOMAIN,
    LEAF_DAYS,
    REGION_DOMAIN,
    serial_number,
    sign_request,
    token_for,
)
from edgefl.protocols.topics import valid_device_name
from edgefl.terminal.text import is_safe

TOKEN_BYTES = 32
VALID_FOR_S = 24 * 3600.0
MAX_TAGS = 32
MAX_TAG_CHARS = 64
DEVICE, REGION = "device", "region"  # roles

REMOVED = "the device was removed from the fleet"
MOVED = "the device is assigned to other parents"

_REMEDY = "make a new one with `edgefl cloud token`"


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrolledDevice:
    """A device of the fleet."""

    name: str
    serial: str  # of its current certificate
    tags: Mapping[str, str]
    enrolled_s: float  # seconds since 1970
    parents: tuple[str, ...] = (CLOUD_NAME,)  # where it connects: the first that it reaches


class Enrolment:
    """Tokens and devices of one fleet. Methods may be called from any thread."""

    def __init__(
        self, engine: sa.Engine, ca_folder: Path, clock: Callable[[], float] = time.time,
        certificate_days: float = LEAF_DAYS,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._ca_folder = ca_folder
        self._clock = clock
        self._certificate_days = certificate_days
        self.renewals = Renewals(engine, ca_folder, clock, certificate_days)

    def new_token(self, valid_for_s: float = VALID_FOR_S, label: str | None = None, role: str = DEVICE) -> str:
        """Make a one-time token. It contains the CA's fingerprint, so that a device can verify the cloud.

        `label` says to people what it is for; `role` is what it enrols, DEVICE or REGION.
        """
        check_token_label(label)
        if not 0 < valid_for_s <= 366 * 24 * 3600:
            raise ConfigError(f"a token valid for {valid_for_s:g} s: expected above 0 s and at most a year")
        secret = secrets.token_urlsafe(TOKEN_BYTES)
        now_s = self._clock()
        row = {"secret_sha256": _hashed(secret), "expires_s": now_s + valid_for_s, "made_s": now_s, "label": label,
               "role": None if role == DEVICE else role}  # fmt: skip
        with self._engine.begin() as db:
            db.execute(tokens.insert().values(row))
        return token_for(secret, (self._ca_folder / "ca.pem").read_bytes())

    def enroll(
        self, secret: str, name: str, tags: Mapping[str, str], csr: bytes, *, role: str = DEVICE,
        parent: str = CLOUD_NAME,
    ) -> bytes:  # fmt: skip
        """Admit a device, or a region below `parent`, and return its certificate (PEM).

        Raises EnrolmentRefused for a token or name, ProtocolError for a request; the token stays valid then.
        """
        _refuse_name(name)
        _refuse_tags(tags)
        hashed, now_s = _hashed(secret), self._clock()
        good = (tokens.c.secret_sha256 == hashed) & _is_open(now_s)
        with self._engine.begin() as db:
            # This write takes the lock first: of two devices with one token, one waits and is refused.
            if db.execute(tokens.update().where(good).values(used_by=name)).rowcount != 1:
                raise EnrolmentRefused(_why_refused(db, hashed))
            if (meant := db.scalar(sa.select(tokens.c.role).where(tokens.c.secret_sha256 == hashed)) or DEVICE) != role:
                raise EnrolmentRefused(
                    f"the token is for a {meant}, and {name!r} enrols as a {role}; {_REMEDY} --role {role}. "
                    "This one is still good"
                )
            if db.scalar(sa.select(devices.c.name).where(devices.c.name == name)) is not None:
                raise EnrolmentRefused(
                    f"a device named {name!r} is enrolled already. Take another --name, or `edgefl devices remove "
                    f"{name}` first; this token is still good."
                )
            domain = REGION_DOMAIN if role == REGION else DEVICE_DOMAIN
            certificate = sign_request(self._ca_folder, csr, name, self._certificate_days, domain)
            row = {"name": name, "serial": serial_number(certificate), "tags": dict(tags), "enrolled_s": now_s,
                   "role": None if role == DEVICE else role,
                   "parents": None if parent == CLOUD_NAME else [parent]}  # fmt: skip
            db.execute(devices.insert().values(row))
        return certificate

    def is_known(self, name: str, serial: str | None = None) -> bool:
        """Whether a device is in the fleet; with a serial number, whether it is of its current or next certificate."""
        with self._engine.connect() as db:
            valid = db.scalar(SERIAL_OF, {"name": name})
        if valid is None or serial in {None, valid}:
            return valid is not None
        return self.renewals.first_use(name, serial)

    def is_device(self, name: str) -> bool:
        """Whether a name is that of an enrolled device, not of a region."""
        found = sa.select(devices.c.name).where((devices.c.name == name) & devices.c.role.is_(sa.null()))
        with self._engine.connect() as db:
            return db.scalar(found) is not None

    def devices(self) -> list[EnrolledDevice]:
        """Return the fleet's devices by name."""
        columns = [devices.c[name] for name in ("name", "serial", "tags", "enrolled_s", "parents")]
        found = sa.select(*columns).where(devices.c.role.is_(sa.null())).order_by(devices.c.name)
        with self._engine.connect() as db:
            return [
                EnrolledDevice(**{**row, "parents": tuple(row["parents"] or (CLOUD_NAME,))})
                for row in db.execute(found).mappings()
            ]

    def remove(self, name: str) -> None:
        """Remove a device and reject its certificate from now on.

        Its updates that are not aggregated yet are refused in the same transaction.
        """
        with self._engine.begin() as db:
            serial = db.scalar(sa.select(devices.c.serial).where(devices.c.name == name))
            if serial is None:
                raise NotFound(f"there is no device {name!r}; list them with `edgefl devices list`")
            db.execute(devices.delete().where(devices.c.name == name))
            for one in (serial, forget_next(db, name)):
                if one is not None:
                    db.execute(revoked.insert().values(serial=one, device=name, revoked_s=self._clock()))
            waiting = (updates.c.device == name) & updates.c.file.is_not(sa.null())
            db.execute(updates.update().where(waiting).values(file=sa.null(), weight=sa.null(), reason=REMOVED))

    def revoked(self) -> list[str]:
        """Return the serial numbers of revoked certificates, in the order of their revocation."""
        with self._engine.connect() as db:
            return list(db.scalars(sa.select(revoked.c.serial).order_by(revoked.c.number)))

    def removed_lately(self) -> list[str]:
        """Return the devices removed within a day, whose connections may still be open after a restart of the cloud."""
        lately = revoked.c.revoked_s > self._clock() - 24 * 3600
        with self._engine.connect() as db:
            names = set(db.scalars(sa.select(revoked.c.device).where(lately)))
            return sorted(names - set(db.scalars(sa.select(devices.c.name))))

    def crl(self) -> bytes:
        """Return the list of revoked certificates (PEM), for a broker."""
        return make_crl(self._ca_folder, self.revoked())

    def has_open_tokens(self) -> bool:
        """Whether there is an unused token that is still valid."""
        with self._engine.connect() as db:
            return db.scalar(sa.select(tokens.c.secret_sha256).where(_is_open(self._clock())).limit(1)) is not None


def _is_open(now_s: float) -> sa.ColumnElement[bool]:
    """Return the condition for a token that can be used."""
    return tokens.c.used_by.is_(sa.null()) & tokens.c.revoked_s.is_(sa.null()) & (tokens.c.expires_s > now_s)


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _why_refused(db: sa.Connection, hashed: str) -> str:
    found = sa.select(tokens.c.used_by, tokens.c.revoked_s).where(tokens.c.secret_sha256 == hashed)
    row = db.execute(found).one_or_none()
    if row is None:
        return f"the token is unknown to this cloud; copy it whole, or {_REMEDY}"
    if row.used_by is not None:
        return f"the token was used already, by device {row.used_by!r}; {_REMEDY}"
    if row.revoked_s is not None:
        return f"the token was revoked; {_REMEDY}"
    return f"the token has expired; {_REMEDY}, with a longer --valid-for if necessary"


def _refuse_name(name: str) -> None:
    if not valid_device_name(name):
        raise EnrolmentRefused(
            f"{name[:80]!r} is not a valid device name: expected 1 to 64 of a-z 0-9 . _ - that begin and end with a "
            "letter or digit, and none of cloud, all, operator. The token is still good."
        )


def _refuse_tags(tags: Mapping[str, str]) -> None:
    longest = max((len(text) for pair in tags.items() for text in pair), default=0)
    if not all(is_safe(text) for pair in tags.items() for text in pair):
        raise EnrolmentRefused("a tag holds control characters; leave them out. The token is still good.")
    if len(tags) > MAX_TAGS or longest > MAX_TAG_CHARS or not all(tags):
        raise EnrolmentRefused(
            f"{len(tags)} tags, the longest text of {longest} characters; a device has at most {MAX_TAGS} tags of "
            f"{MAX_TAG_CHARS} characters, with no empty key. The token is still good."
        )
