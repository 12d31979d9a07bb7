"""The list of revoked certificates (CRL, RFC 5280 section 5) for a broker that has no access to the registry.

Its dates do not depend on a clock: it is valid from 1970 plus its number in seconds, and expires with the CA. If a
broker has several lists, it uses the one with the latest start, so each must start later than the one before.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from edgefl.protocols.tls import BEGIN, load_ca


def make_crl(ca_folder: Path, serials: Sequence[str]) -> bytes:
    """Return the CRL (PEM) for serial numbers (hex) in the order of their revocation."""
    ca, key = load_ca(ca_folder)
    number = 1 + len(serials)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(BEGIN + datetime.timedelta(seconds=number))
        .next_update(ca.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(BEGIN)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
