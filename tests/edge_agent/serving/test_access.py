"""Who may ask for predictions."""

from __future__ import annotations

import socket
import ssl
import threading

import pytest

from edge_agent.serving.access import Access, server_context
from edgefl.errors import ConfigError
from edgefl.protocols import tls


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_guard(host):
    assert Access(host=host).token() == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "device.example"])  # noqa: S104
def test_a_network_needs_one(host, tmp_path):
    with pytest.raises(ConfigError, match=r"--serve-tls .* or --serve-token-file"):
        Access(host=host)
    Access(host=host, mutual_tls=True)
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert Access(host=host, token_file=tmp_path / "token").token() == "0123456789abcdef"


@pytest.mark.parametrize("text", ["", "short", "with a space in the middle", "caf\u00e9-caf\u00e9-caf\u00e9-caf\u00e9"])
def test_what_is_no_token(text, tmp_path):
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match="must hold one token of at least 16"):
        Access(host="127.0.0.1", token_file=tmp_path / "token")
    with pytest.raises(ConfigError, match="cannot be read"):
        Access(host="127.0.0.1", token_file=tmp_path / "none")


def test_a_renewed_certificate_is_shown_from_the_next_connection_on(fleet_ca):
    identity = fleet_ca.device("cam-1")
    (identity.cert.parent / "ca.pem").write_bytes(identity.ca.read_bytes())
    context = server_context(identity.cert.parent)
    before = shown(context, identity)
    assert before == tls.serial_number(identity.cert.read_bytes())
    renewed = tls.sign_request(fleet_ca.folder, tls.request_for(tls.saved_key(identity.key), "cam-1"), "cam-1")
    (identity.cert.parent / "new").write_bytes(renewed)
    (identity.cert.parent / "new").replace(identity.cert)
    assert shown(context, identity) == tls.serial_number(renewed) != before


def shown(context, identity):
    """Return the serial number of what a server shows."""
    ours, theirs = socket.socketpair()

    def serve():
        with context.wrap_socket(theirs, server_side=True) as connection:
            connection.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    client = tls.client_context(identity.ca, identity)
    with client.wrap_socket(ours, server_hostname="cam-1.device.edgefl.internal") as connection:
        serial = tls.serial_number(ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True)).encode())
        connection.send(b"x")
    thread.join(30)
    return serial
