"""A request for a new certificate, as regions pass it on: whose it is, is proven by the request itself.

A device, or a region, signs the request for its new key with the key of its current certificate. So a region, which
answers the calls of those below it, cannot ask for a certificate in their name: it has neither of the two keys.
ECDSA over P-256 with SHA-256 (FIPS 186-5), over a prefix and the PKCS #10 request.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from edgefl.errors import ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.tls import common_name, load_certificate

PREFIX = b"edgefl certificate renewal\0"  # so that the signature is of nothing else


def signed_request(csr: bytes, certificate: bytes, key: ec.EllipticCurvePrivateKey) -> pb.RenewRequest:
    """Return a request (PEM) signed with the key of the current certificate (PEM)."""
    signature = key.sign(PREFIX + csr, ec.ECDSA(hashes.SHA256()))
    return pb.RenewRequest(csr=csr, certificate=certificate, signature=signature)


def owner_of(request: pb.RenewRequest, ca: x509.Certificate) -> str:
    """Return the device or region that has signed a request, by its certificate of this CA; raises ProtocolError.

    The caller checks that the certificate is not revoked.
    """
    try:
        certificate = load_certificate(request.certificate)
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as cause:
        raise ProtocolError("the request for a new certificate shows no certificate of this fleet's CA") from cause
    name, key = common_name(request.certificate), certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError(f"the certificate of {name!r} is not for an EC key")
    try:
        key.verify(request.signature, PREFIX + request.csr, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as cause:
        raise ProtocolError(f"the request for a new certificate is not signed by the key of {name!r}") from cause
    return name
