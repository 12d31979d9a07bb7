"""The certificates of the cloud and of its mosquitto: reissued by the same CA when they are no longer suitable.

They are checked at each start and by a timer. A certificate is suitable if our CA signed it for our key, it names
every host, is valid from 1970, and has a third of its lifetime left. A usable key is kept, so that a renewal replaces
one file atomically. The CA's own certificate is renewed in the same way, with the same name and key, so everything
that it has signed, and every copy of it, remains valid.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Collection, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgefl.process.home import replace_file
from edgefl.protocols.tls import (
    BEGIN,
    LEAF_DAYS,
    NO_END,
    Identity,
    certify_server,
    issue_server,
    load_ca,
    self_signed,
)

LEFT = 1 / 3  # of its lifetime: a certificate with less left is renewed


def ends_soon(cert: x509.Certificate, days: float, now: datetime.datetime) -> bool:
    """Whether the certificate has less left than a third of `days`, the lifetime of a new one."""
    return cert.not_valid_after_utc - now < datetime.timedelta(days=days * LEFT)


def begins_late(cert: x509.Certificate) -> bool:
    """Whether a slow clock may show a time before the certificate is valid."""
    return cert.not_valid_before_utc > BEGIN


def renew_server(ca_folder: Path, identity: Identity, hosts: Sequence[str], name: str, days: float = LEAF_DAYS) -> bool:
    """Reissue a server's certificate if it is not suitable, with a new key if the old one is unusable.

    Returns whether it was reissued.
    """
    ca, _ = load_ca(ca_folder)
    key, cert = _key(identity.key), _certificate(identity.cert)
    usable = key is not None and cert is not None and cert.public_key() == key.public_key() and _is_signed_by(cert, ca)
    if not usable or key is None or cert is None:
        issue_server(ca_folder, identity, hosts, name, days)
        return True
    now = datetime.datetime.now(datetime.UTC)
    if begins_late(cert) or ends_soon(cert, days, now) or not _normalized(hosts) <= set(hosts_of(cert)):
        replace_file(identity.cert, certify_server(ca_folder, key.public_key(), hosts, name, days))
        return True
    return False


def renew_ca(folder: Path) -> bool:
    """Reissue the certificate of a CA from an older version, which is valid from its creation and for ten years only.

    Returns whether it was reissued. This changes its fingerprint, which tokens contain: the caller makes sure that no
    token is in use.
    """
    ca, key = load_ca(folder)
    if ca.not_valid_before_utc <= BEGIN and ca.not_valid_after_utc >= NO_END:
        return False
    replace_file(folder / "ca.pem", self_signed(key, ca.subject))
    return True


def hosts_of(cert: x509.Certificate) -> list[str]:
    """Return the names and addresses in a server's certificate."""
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _normalized(hosts: Collection[str]) -> set[str]:
    """Return hosts as a certificate stores them: addresses in their shortest form."""
    return {_shortest(host) for host in hosts}


def _shortest(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _certificate(path: Path) -> x509.Certificate | None:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _is_signed_by(cert: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        cert.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
