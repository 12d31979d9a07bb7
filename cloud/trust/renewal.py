"""Renewal of certificates of devices and regions, over a connection that was opened with the current one.

The cloud's clock decides when, because a device's clock may be wrong by years. The current certificate is valid until
the new one is first used, so that a lost reply locks no device out; then it is revoked.
Invariant: each certificate that was signed for a device is its current one, its next one, or revoked.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from cloud.state.store import devices, renewals, revoked
from cloud.trust.own_certificates import begins_late, ends_soon
from edgefl.errors import EnrolmentRefused, ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.certificates.requests import owner_of
from edgefl.protocols.tls import (
    DEVICE_DOMAIN,
    LEAF_DAYS,
    REGION_DOMAIN,
    load_certificate,
    serial_number,
    sign_request,
)

AGAIN_S = 3600.0  # between a device's requests with different keys: each adds an entry to the CRL


class Renewals:
    """Issues the next certificates of devices. Methods may be called from any thread."""

    def __init__(
        self, engine: sa.Engine, ca_folder: Path, clock: Callable[[], float] = time.time,
        certificate_days: float = LEAF_DAYS,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._ca_folder = ca_folder
        self._clock = clock
        self._days = certificate_days

    def is_due(self, certificate: bytes) -> bool:
        """Whether a device should renew this certificate (PEM or DER)."""
        return is_due(certificate, self._days, self._clock())

    def renew_for(self, request: pb.RenewRequest, region: str, may_pass: Callable[[str, str], bool]) -> bytes:
        """Return a new certificate (PEM) by a request that a region sent or passed on, which proves whose it is.

        `may_pass` tells whether the region may speak for another member. Raises as `renew` does.
        """
        ca = load_certificate((self._ca_folder / "ca.pem").read_bytes())
        device = owner_of(request, ca)
        if device != region and not may_pass(region, device):
            raise ProtocolError(f"region {region!r} speaks for {device!r}, which may not connect below it")
        serial = serial_number(request.certificate)
        with self._engine.connect() as db:
            is_current = db.scalar(sa.select(devices.c.serial).where(devices.c.name == device)) == serial
        if not is_current and not self.first_use(device, serial):
            raise EnrolmentRefused(f"the certificate of device {device!r} was replaced or revoked")
        if not self.is_due(request.certificate):
            raise ProtocolError("this certificate need not be renewed yet")
        return self.renew(device, request.csr)

    def renew(self, device: str, csr: bytes) -> bytes:
        """Return a new certificate (PEM), or the same one again if the request has the same key.

        Raises ProtocolError for an invalid request, EnrolmentRefused for an unknown device or too many requests.
        """
        now_s = self._clock()
        here = renewals.c.device == device
        with self._engine.begin() as db:
            # This write takes the lock first, so that two requests of one device are serialized.
            if db.execute(devices.update().where(devices.c.name == device).values(name=device)).rowcount != 1:
                raise EnrolmentRefused(f"there is no device {device!r}; enrol it with a new token")
            is_region = db.scalar(sa.select(devices.c.role).where(devices.c.name == device)) is not None
            before = db.execute(renewals.select().where(here)).mappings().one_or_none()
            if before is not None and _same_key(before["certificate"], csr):
                return str(before["certificate"]).encode()
            if before is not None and abs(now_s - before["issued_s"]) < AGAIN_S:
                raise EnrolmentRefused(
                    f"device {device!r} has an unused new certificate and requests another one with a different key; "
                    f"this is allowed {AGAIN_S:g} s after the first"
                )
            domain = REGION_DOMAIN if is_region else DEVICE_DOMAIN
            certificate = sign_request(self._ca_folder, csr, device, self._days, domain)
            if before is not None:
                db.execute(renewals.delete().where(here))
                db.execute(revoked.insert().values(serial=before["serial"], device=device, revoked_s=now_s))
            row = {"serial": serial_number(certificate), "certificate": certificate.decode(), "issued_s": now_s}
            db.execute(renewals.insert().values(row | {"device": device}))
        return certificate

    def has_next(self, device: str) -> bool:
        """Whether a device has a new certificate that it has not used yet."""
        with self._engine.connect() as db:
            return db.scalar(sa.select(renewals.c.serial).where(renewals.c.device == device)) is not None

    def first_use(self, device: str, serial: str) -> bool:
        """Whether a device may use this certificate; its next one becomes the current one, the old one is revoked."""
        its_next = (renewals.c.device == device) & (renewals.c.serial == serial)
        valid = sa.select(devices.c.serial).where(devices.c.name == device)
        with self._engine.connect() as db:  # no lock for unknown certificates, which are most of the calls
            if db.scalar(sa.select(renewals.c.serial).where(its_next)) is None:
                return bool(db.scalar(valid) == serial)  # a concurrent call was the first use
        with self._engine.begin() as db:
            if db.execute(renewals.delete().where(its_next)).rowcount != 1:
                return bool(db.scalar(valid) == serial)
            former = db.scalar(valid)
            db.execute(revoked.insert().values(serial=former, device=device, revoked_s=self._clock()))
            db.execute(devices.update().where(devices.c.name == device).values(serial=serial))
        return True


def is_due(certificate: bytes, days: float, now_s: float) -> bool:
    """Whether a certificate (PEM or DER) should be renewed, if new ones are valid for so many days."""
    cert, now = load_certificate(certificate), datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    return begins_late(cert) or ends_soon(cert, days, now)


def forget_next(db: sa.Connection, device: str) -> str | None:
    """Delete the next certificate of a removed device; return its serial number, if it had one."""
    serial = db.scalar(sa.select(renewals.c.serial).where(renewals.c.device == device))
    db.execute(renewals.delete().where(renewals.c.device == device))
    return serial


def _same_key(certificate: str, csr: bytes) -> bool:
    try:
        key = x509.load_pem_x509_csr(csr).public_key()
    except (ValueError, UnsupportedAlgorithm) as cause:
        raise ProtocolError(f"the signing request is not PKCS #10: {cause}") from cause
    return key == load_certificate(certificate.encode()).public_key()
