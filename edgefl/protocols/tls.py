"""Certificates and TLS: the fleet's own CA, mutual TLS for gRPC and MQTT, TLS 1.3 where we can choose.

EC P-256 keys, X.509 by `cryptography`. A device's certificate names it (CN = device id) and is made
from its own signing request, so its key never leaves the device. gRPC's Python API cannot set a
minimum version; both of our ends use 1.3, and a test checks it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgefl.errors import HomeError, ProtocolError
from edgefl.process.home import replace_file

if TYPE_CHECKING:
    import grpc

# Every certificate begins in 1970, so that it is valid on a device whose clock is behind. A CA certificate
# does not expire (RFC 5280, section 4.1.2.5), so that a fleet keeps working for years.
BEGIN = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
NO_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
LEAF_DAYS = 397.0
# A device is a server only by a name in this domain: its own name may be that of another host.
DEVICE_DOMAIN = ".device.edgefl.internal"
REGION_DOMAIN = ".region.edgefl.internal"  # of a region's servers: the only name in its certificate
_WRITTEN = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)  # a clock before this day is wrong

CLOUD_NAME = "cloud"
BROKER_NAME = "broker"  # name of a broker outside the cloud: its key must not be valid for the cloud


@dataclass(frozen=True, slots=True)
class Identity:
    """Paths of a party's key, its certificate and the CA that it trusts (PEM files)."""

    key: Path
    cert: Path
    ca: Path

    @classmethod
    def in_folder(cls, folder: Path) -> Identity:
        return cls(folder / "key.pem", folder / "cert.pem", folder / "ca.pem")


def create_ca(folder: Path) -> None:
    """Create `ca.key` (0600) and `ca.pem` in a folder that has none."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edgefl fleet CA")])
    write_private(folder / "ca.key", _key_pem(key))
    (folder / "ca.pem").write_bytes(self_signed(key, name))


def self_signed(key: ec.EllipticCurvePrivateKey, name: x509.Name) -> bytes:
    """Return a CA's certificate (PEM)."""
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    cert = (
        _builder(name, name, key.public_key(), NO_END)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return cert.public_bytes(serialization.Encoding.PEM)


def issue_server(
    ca_folder: Path, identity: Identity, hosts: Sequence[str], name: str = CLOUD_NAME, days: float | None = None
) -> None:
    """Create a server's key and certificate, valid as server for `hosts` and as client `name`."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = certify_server(ca_folder, key.public_key(), hosts, name, days)
    identity.key.unlink(missing_ok=True)
    write_private(identity.key, _key_pem(key))
    replace_file(identity.cert, pem)


def certify_server(
    ca_folder: Path, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], name: str, days: float | None = None
) -> bytes:
    """Return a server's certificate (PEM) for its existing key."""
    return _sign_leaf(ca_folder, name, key, hosts, days)


def new_request(identity: Identity, device: str) -> bytes:
    """Create a device's key (0600) and return its signing request (PEM)."""
    identity.key.unlink(missing_ok=True)
    return request_for(saved_key(identity.key), device)


def saved_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key in a file; creates the file (0600) if it is missing or unreadable."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key
    key = ec.generate_private_key(ec.SECP256R1())
    path.unlink(missing_ok=True)
    write_private(path, _key_pem(key))
    return key


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key in a file; raises ValueError or HomeError for anything else."""
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise HomeError(f"{path} does not hold an EC key; enrol again in another --home")
    return key


def request_for(key: ec.EllipticCurvePrivateKey, device: str) -> bytes:
    """Return a signing request (PEM) for a key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def sign_request(
    ca_folder: Path, request_pem: bytes, device: str, days: float | None = None, domain: str = DEVICE_DOMAIN
) -> bytes:
    """Return the certificate (PEM) of a device's request; its CN is `device` whatever the request says.

    `domain` says what it is: a device, or with REGION_DOMAIN a region.

    Raises ProtocolError for an invalid request, or one that is not signed with its own key.
    """
    try:
        request = x509.load_pem_x509_csr(request_pem)
        key, proven = request.public_key(), request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as cause:
        raise ProtocolError(f"the signing request is not PKCS #10: {cause}") from cause
    if not proven or not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError("the signing request must hold an EC key and be signed by it")
    return _sign_leaf(ca_folder, device, key, (device + domain,), days)


def fingerprint(cert_pem: bytes) -> str:
    """Return the SHA-256 of a certificate in hex, by which an enrolment token names its CA."""
    return x509.load_pem_x509_certificate(cert_pem).fingerprint(hashes.SHA256()).hex()


def load_certificate(cert: bytes) -> x509.Certificate:
    """Return a certificate from PEM or DER; raises ValueError for anything else."""
    load = x509.load_pem_x509_certificate if cert.startswith(b"-----") else x509.load_der_x509_certificate
    return load(cert)


def serial_number(cert: bytes) -> str:
    """Return the serial number, in hex, of a certificate in PEM or DER."""
    return f"{load_certificate(cert).serial_number:x}"


def common_name(cert: bytes) -> str:
    """Return the CN of a certificate in PEM or DER."""
    names = load_certificate(cert).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def is_region(cert: bytes) -> bool:
    """Whether a certificate in PEM or DER is that of a region."""
    loaded = load_certificate(cert)
    try:
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    return common_name(cert) + REGION_DOMAIN in names.get_values_for_type(x509.DNSName)


def expires(cert_pem: bytes) -> datetime.datetime:
    """Return when a certificate expires (UTC)."""
    return x509.load_pem_x509_certificate(cert_pem).not_valid_after_utc


def server_context(identity: Identity, *, client_certificates: bool) -> ssl.SSLContext:
    """TLS 1.3 for an edgefl server; with `client_certificates`, only for clients of our CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(identity.cert, identity.key)
    if client_certificates:
        context.load_verify_locations(identity.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class _NamedContext(ssl.SSLContext):
    """Expects one name of the server, whatever its address: a region's certificate has no addresses."""

    server_name: str

    def wrap_socket(self, *arguments: Any, **named: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*arguments, **{**named, "server_hostname": self.server_name})

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        return super().wrap_bio(*arguments, **{**named, "server_hostname": self.server_name})


def client_context(ca: Path, identity: Identity | None = None, server_name: str = "") -> ssl.SSLContext:
    """TLS 1.3 for a client of a server of our CA, with a client certificate if `identity` is given.

    The server's certificate must have its host's name or address, or else `server_name`, if that is given.
    """
    context = (_NamedContext if server_name else ssl.SSLContext)(ssl.PROTOCOL_TLS_CLIENT)
    if isinstance(context, _NamedContext):
        context.server_name = server_name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ca)
    if identity is not None:
        context.load_cert_chain(identity.cert, identity.key)
    return context


def grpc_server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Mutual TLS for a gRPC server; a renewed certificate is used from the next handshake on."""
    import grpc

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = (identity.key.read_bytes(), identity.cert.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], identity.ca.read_bytes())

    seen = [_stamp(identity)]

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        stamp = _stamp(identity)
        if stamp == seen[0]:
            return None
        fresh = configuration()
        seen[0] = stamp  # only after success: if the files cannot be read, the next handshake tries again
        return fresh

    fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", renewed)  # the type stubs lack the None
    return grpc.dynamic_ssl_server_credentials(configuration(), fetcher, require_client_authentication=True)


def reloading(context: ssl.SSLContext, identity: Identity) -> Callable[[], None]:
    """Return a function that reloads a context's certificate if its file has changed."""
    seen = [_stamp(identity)]

    def reload() -> None:
        stamp = _stamp(identity)
        if stamp != seen[0]:
            context.load_cert_chain(identity.cert, identity.key)
            seen[0] = stamp

    return reload


def _stamp(identity: Identity) -> tuple[int, int]:
    """Return values that change whenever a certificate's file is replaced."""
    facts = identity.cert.stat()
    return facts.st_ino, facts.st_mtime_ns


def grpc_channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Mutual TLS for a gRPC client."""
    import grpc

    return grpc.ssl_channel_credentials(identity.ca.read_bytes(), identity.key.read_bytes(), identity.cert.read_bytes())


def token_for(secret: str, ca_pem: bytes) -> str:
    """Return an enrolment token: a secret, and the fingerprint of the CA to trust."""
    return f"efl1.{secret}.{fingerprint(ca_pem)}"


def parse_token(token: str) -> tuple[str, str]:
    """Return (secret, CA fingerprint) of an enrolment token; raises ProtocolError."""
    parts = token.strip().split(".")
    if len(parts) != 3 or parts[0] != "efl1" or len(parts[2]) != hashlib.sha256().digest_size * 2:
        raise ProtocolError("the token is not of the form efl1.<secret>.<fingerprint>; copy the complete token")
    return parts[1], parts[2]


def write_private(path: Path, data: bytes) -> None:
    """Write a new file with mode 0600; raises HomeError if it exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as cause:
        raise HomeError(f"{path} already exists and is not overwritten") from cause
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return the certificate and the key of the CA in a folder."""
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise HomeError(f"{folder / 'ca.key'} does not hold an EC key")
    return x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()), key


def _sign_leaf(
    ca_folder: Path, name: str, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], days: float | None
) -> bytes:
    ca, ca_key = load_ca(ca_folder)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    lifetime = datetime.timedelta(days=LEAF_DAYS if days is None else days)
    end = max(datetime.datetime.now(datetime.UTC), _WRITTEN) + lifetime
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])]
    builder = (
        _builder(subject, ca.subject, key, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_alternative_name(host) for host in hosts]), critical=False
        )
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(BEGIN)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
