"""The next certificate of this machine, a device's or a region's: the request for it, and its installation.

The new key is made here and kept in `next.key` until there is a certificate for it: after an interrupted attempt, a
request for the same key is sent again, and the cloud returns the same certificate. Key and certificate are replaced in
one step. A new certificate of the CA is taken only for the key that is trusted already.
"""

from __future__ import annotations

import logging
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.process.home import replace_file
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.certificates.pair import replace_pair
from edgefl.protocols.certificates.requests import signed_request
from edgefl.protocols.tls import (
    Identity,
    common_name,
    expires,
    is_region,
    load_certificate,
    load_key,
    request_for,
    saved_key,
)

NEXT_KEY = "next.key"

_log = logging.getLogger(__name__)


def next_request(folder: Path, name: str) -> pb.RenewRequest:
    """Return a request for the next key, signed with the present one; raises OSError, ValueError, HomeError."""
    csr = request_for(saved_key(folder / NEXT_KEY), name)
    held = Identity.in_folder(folder)
    return signed_request(csr, held.cert.read_bytes(), load_key(held.key))


def install(folder: Path, name: str, reply: pb.RenewReply) -> None:
    """Check a reply, then replace key, certificate and, if it was renewed too, the CA's certificate.

    Raises ProtocolError, OSError, ValueError; then nothing has changed, but perhaps the CA's certificate stays old.
    """
    key, held = saved_key(folder / NEXT_KEY), Identity.in_folder(folder)
    certificate, ca, held_ca = bytes(reply.certificate), bytes(reply.ca), load_certificate(held.ca.read_bytes())
    _check_certificate(certificate, name, held_ca)
    if is_region(certificate) is not is_region(held.cert.read_bytes()):
        raise ProtocolError(f"the new certificate is a {'region' if is_region(certificate) else 'device'}'s")
    if load_certificate(certificate).public_key() != key.public_key():
        raise ProtocolError("the cloud's certificate is not for this device's key")
    replace_pair(folder, (folder / NEXT_KEY).read_bytes(), certificate)
    (folder / NEXT_KEY).unlink()
    event(_log, logging.INFO, "certificate.renewed", ends=f"{expires(certificate):%Y-%m-%d}")
    if ca and ca != held.ca.read_bytes():
        _check_ca(ca, held_ca)
        replace_file(held.ca, ca)


def _check_certificate(certificate: bytes, name: str, ca: x509.Certificate) -> None:
    if common_name(certificate) != name:
        raise ProtocolError(f"the cloud's certificate names {common_name(certificate)!r}, not {name!r}")
    try:
        load_certificate(certificate).verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as cause:
        raise ProtocolError("the cloud's certificate was not signed by this fleet's CA") from cause


def _check_ca(ca_pem: bytes, held: x509.Certificate) -> None:
    """Refuse a new CA certificate unless it is for the key that is trusted already."""
    ca = load_certificate(ca_pem)
    try:
        ca.verify_directly_issued_by(held)
    except (ValueError, TypeError, InvalidSignature) as cause:
        raise ProtocolError("the CA's new certificate is not signed by the CA") from cause
    if ca.public_key() != held.public_key():
        raise ProtocolError("the CA's new certificate is for another key; the old certificate is kept")
