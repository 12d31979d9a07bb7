"""Certificates and TLS over real sockets: our CA is let in, and nobody else."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgefl.errors import HomeError, ProtocolError
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity


def new_fleet(folder: Path, hosts: tuple[str, ...] = ("localhost", "127.0.0.1")) -> Identity:
    folder.mkdir()
    tls.create_ca(folder)
    identity = Identity.in_folder(folder)
    tls.issue_server(folder, identity, hosts)
    return identity


def new_device(ca_folder: Path, folder: Path, name: str) -> Identity:
    folder.mkdir()
    identity = Identity.in_folder(folder)
    identity.cert.write_bytes(tls.sign_request(ca_folder, tls.new_request(identity, name), name))
    identity.ca.write_bytes((ca_folder / "ca.pem").read_bytes())
    return identity


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fleets, each with a CA, a cloud and a device: ours and another."""
    root = tmp_path_factory.mktemp("fleets")
    for name in ("ours", "other"):
        new_fleet(root / name)
        new_device(root / name, root / f"{name}-device", "pi-4")
    return root


def identity(fleet: Path, name: str) -> Identity:
    return Identity.in_folder(fleet / name)


@contextlib.contextmanager
def listening(context: ssl.SSLContext, versions: list[str | None] | None = None) -> Iterator[tuple[str, int]]:
    """Serve TLS connections one after another: answers the client's CN, or closes where it is refused."""
    noted = [] if versions is None else versions
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                with raw, contextlib.suppress(OSError):
                    raw.settimeout(10)
                    with context.wrap_socket(raw, server_side=True) as connection:
                        noted.append(connection.version())
                        seen = connection.getpeercert(binary_form=True)
                        connection.sendall(tls.common_name(seen).encode() if seen else b"nobody")

        thread = threading.Thread(target=serve, name="tls server of the test")
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def ask(address: tuple[str, int], context: ssl.SSLContext, host: str = "localhost") -> tuple[str, str | None]:
    with socket.create_connection(address, 10) as raw, context.wrap_socket(raw, server_hostname=host) as connection:
        return connection.recv(100).decode(), connection.version()


# --- certificates -----------------------------------------------------------------------------------------------


def test_keys_are_private_and_never_overwritten(fleet: Path, tmp_path: Path) -> None:
    for key in (fleet / "ours" / "ca.key", fleet / "ours" / "key.pem", fleet / "ours-device" / "key.pem"):
        assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(HomeError, match=r"ca\.key already exists and is not overwritten"):
        tls.create_ca(fleet / "ours")
    before = os.umask(0)
    try:
        tls.write_private(tmp_path / "key", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_device_certificate_by_hand(fleet: Path) -> None:
    pem = identity(fleet, "ours-device").cert.read_bytes()
    cert = x509.load_pem_x509_certificate(pem)
    cert.verify_directly_issued_by(x509.load_pem_x509_certificate((fleet / "ours" / "ca.pem").read_bytes()))
    now = datetime.datetime.now(datetime.UTC)
    assert tls.common_name(pem) == "pi-4"
    assert tls.common_name(cert.public_bytes(serialization.Encoding.DER)) == "pi-4"
    assert list(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
    ]
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("pi-4.device.edgefl.internal")]  # never a name that another host may have
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert now + datetime.timedelta(days=396) < tls.expires(pem) < now + datetime.timedelta(days=398)
    assert cert.not_valid_before_utc.timestamp() == 0  # a device's clock may be behind, by however much
    assert tls.serial_number(pem) == f"{cert.serial_number:x}"


def test_the_name_is_the_clouds_to_give(fleet: Path, tmp_path: Path) -> None:
    request = tls.new_request(Identity.in_folder(tmp_path), "cloud")
    assert tls.common_name(tls.sign_request(fleet / "ours", request, "pi-5")) == "pi-5"


def test_a_new_certificate_replaces_the_cloud_s_own(tmp_path: Path) -> None:
    own = new_fleet(tmp_path / "fleet", ("127.0.0.1",))
    before = own.cert.read_bytes()
    tls.issue_server(tmp_path / "fleet", own, ("localhost", "10.0.0.9"))
    assert own.cert.read_bytes() != before
    names = x509.load_pem_x509_certificate(own.cert.read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)] == ["10.0.0.9"]


def request_with(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")])
    digest = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, digest)
    return request.public_bytes(serialization.Encoding.PEM)


def unproven_request() -> bytes:
    """A request whose signature is by another key than the one in it: its last byte is changed."""
    der = x509.load_pem_x509_csr(request_with(ec.generate_private_key(ec.SECP256R1()))).public_bytes(
        serialization.Encoding.DER
    )
    forged = der[:-1] + bytes([der[-1] ^ 1])
    return x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "request_pem",
    [b"", b"no request", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
     request_with(ed25519.Ed25519PrivateKey.generate()), unproven_request()],
    ids=["empty", "text", "not DER", "another kind of key", "unproven"],
)  # fmt: skip
def test_a_bad_signing_request_is_refused(fleet: Path, request_pem: bytes) -> None:
    with pytest.raises(ProtocolError, match="the signing request"):
        tls.sign_request(fleet / "ours", request_pem, "a")


# --- sockets ----------------------------------------------------------------------------------------------------


def test_our_device_is_let_in_by_name_over_tls_1_3(fleet: Path) -> None:
    cloud, device = identity(fleet, "ours"), identity(fleet, "ours-device")
    with listening(tls.server_context(cloud, client_certificates=True)) as address:
        assert ask(address, tls.client_context(device.ca, device)) == ("pi-4", "TLSv1.3")
        assert ask(address, tls.client_context(device.ca, device), "127.0.0.1") == ("pi-4", "TLSv1.3")
        assert ask(address, tls.client_context(cloud.ca, cloud)) == ("cloud", "TLSv1.3")


def test_enrolment_needs_no_certificate_yet(fleet: Path) -> None:
    cloud = identity(fleet, "ours")
    with listening(tls.server_context(cloud, client_certificates=False)) as address:
        assert ask(address, tls.client_context(cloud.ca)) == ("nobody", "TLSv1.3")


@pytest.mark.parametrize("stranger", ["other-device", None])
def test_a_stranger_is_not_let_in(fleet: Path, stranger: str | None) -> None:
    cloud = identity(fleet, "ours")
    who = None if stranger is None else identity(fleet, stranger)
    # TLS 1.3 tells a client at its first read
    with (
        listening(tls.server_context(cloud, client_certificates=True)) as address,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        ask(address, tls.client_context(cloud.ca, who))


def test_a_device_does_not_talk_to_another_cloud(fleet: Path) -> None:
    device = identity(fleet, "ours-device")
    with (
        listening(tls.server_context(identity(fleet, "other"), client_certificates=False)) as address,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ask(address, tls.client_context(device.ca, device))


def test_a_cloud_of_another_host_name_is_refused(fleet: Path) -> None:
    device = identity(fleet, "ours-device")
    with (
        listening(tls.server_context(identity(fleet, "ours"), client_certificates=True)) as address,
        pytest.raises(ssl.SSLCertVerificationError, match="mismatch"),
    ):
        ask(address, tls.client_context(device.ca, device), "elsewhere.example")


def test_a_device_cannot_pose_as_the_cloud(fleet: Path) -> None:
    device = identity(fleet, "ours-device")
    with (
        listening(tls.server_context(device, client_certificates=False)) as address,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        ask(address, tls.client_context(device.ca, device))


def test_tls_1_2_is_refused_by_both_ends(fleet: Path) -> None:
    cloud, device = identity(fleet, "ours"), identity(fleet, "ours-device")
    old = tls.client_context(device.ca, device)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with listening(tls.server_context(cloud, client_certificates=True)) as address, pytest.raises(ssl.SSLError):
        ask(address, old)
    server = tls.server_context(cloud, client_certificates=True)
    server.minimum_version = server.maximum_version = ssl.TLSVersion.TLSv1_2
    with listening(server) as address, pytest.raises(ssl.SSLError):
        ask(address, tls.client_context(device.ca, device))


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def echo(_request: bytes, context: grpc.ServicerContext) -> bytes:
            return b" ".join(context.auth_context()["x509_common_name"])

        return grpc.unary_unary_rpc_method_handler(echo)


@pytest.fixture
def grpc_port(fleet: Path) -> Iterator[int]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_secure_port("127.0.0.1:0", tls.grpc_server_credentials(identity(fleet, "ours")))
    server.start()
    yield port
    server.stop(None).wait(10)


def call(port: int, credentials: grpc.ChannelCredentials) -> bytes:
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        reply: bytes = channel.unary_unary("/test/Echo")(b"", timeout=10)
        return reply


def test_grpc_knows_the_device_by_its_certificate(fleet: Path, grpc_port: int) -> None:
    assert call(grpc_port, tls.grpc_channel_credentials(identity(fleet, "ours-device"))) == b"pi-4"


def test_grpc_lets_no_stranger_in(fleet: Path, grpc_port: int) -> None:
    ours, other = identity(fleet, "ours-device"), identity(fleet, "other-device")
    strangers = {
        "of another CA": grpc.ssl_channel_credentials(
            ours.ca.read_bytes(), other.key.read_bytes(), other.cert.read_bytes()
        ),
        "without a certificate": grpc.ssl_channel_credentials(ours.ca.read_bytes()),
        "who trusts another CA": tls.grpc_channel_credentials(other),
    }
    for credentials in strangers.values():
        with pytest.raises(grpc.RpcError) as refusal:
            call(grpc_port, credentials)
        assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE


def test_grpc_speaks_tls_1_3(fleet: Path, grpc_port: int) -> None:
    """grpc's API cannot set a minimum version; what both of our ends choose is 1.3."""
    device = identity(fleet, "ours-device")
    context = tls.client_context(device.ca, device)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", grpc_port), 10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        assert (connection.version(), connection.selected_alpn_protocol()) == ("TLSv1.3", "h2")
    seen: list[str | None] = []
    server = tls.server_context(identity(fleet, "ours"), client_certificates=True)
    server.set_alpn_protocols(["h2"])
    with listening(server, seen) as (_, port), pytest.raises(grpc.RpcError):  # no gRPC behind the handshake
        call(port, tls.grpc_channel_credentials(device))
    assert seen[0] == "TLSv1.3"


# --- tokens -----------------------------------------------------------------------------------------------------


def test_a_token_names_its_ca(fleet: Path) -> None:
    ca_pem = (fleet / "ours" / "ca.pem").read_bytes()
    token = tls.token_for("s3cret", ca_pem)
    assert tls.parse_token(f" {token}\n") == ("s3cret", tls.fingerprint(ca_pem))
    assert tls.fingerprint(ca_pem) != tls.fingerprint((fleet / "other" / "ca.pem").read_bytes())


@pytest.mark.parametrize("token", ["", "efl1", "efl1.a", "efl2.a." + "0" * 64, "efl1.a." + "0" * 63, "a.b.c.d"])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(ProtocolError, match="copy the complete token"):
        tls.parse_token(token)
