"""Who may ask for predictions."""

from __future__ import annotations

import contextlib
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloud.trust.crl import make_crl
from edge_agent.serving.access import REVOKED_FILE, Access, server_contexts
from edgefl.errors import ConfigError
from edgefl.process.home import replace_file
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
    with pytest.raises(ConfigError, match="must contain one token of at least 16"):
        Access(host="127.0.0.1", token_file=tmp_path / "token")
    with pytest.raises(ConfigError, match="cannot be read"):
        Access(host="127.0.0.1", token_file=tmp_path / "none")


@pytest.fixture
def device(fleet_ca):
    """The identity of the device that serves; its folder is a home's."""
    identity = fleet_ca.device("cam-1")
    (identity.cert.parent / "ca.pem").write_bytes(identity.ca.read_bytes())
    return tls.Identity.in_folder(identity.cert.parent)


def test_a_renewed_certificate_is_shown_from_the_next_connection_on(fleet_ca, device):
    contexts = server_contexts(device.cert.parent)
    before = shown(contexts, device)
    assert before == tls.serial_number(device.cert.read_bytes())
    renewed = tls.sign_request(fleet_ca.folder, tls.request_for(tls.saved_key(device.key), "cam-1"), "cam-1")
    replace_file(device.cert, renewed)
    assert shown(contexts, device) == tls.serial_number(renewed) != before


def test_who_is_on_the_list_is_refused_from_the_next_connection_on(fleet_ca, device):
    contexts = server_contexts(device.cert.parent)
    removed, stays = fleet_ca.device("cam-2"), fleet_ca.device("cam-3")
    serials = [tls.serial_number(fleet_ca.device(name).cert.read_bytes()) for name in ("cam-2", "cam-4")]
    for one in (removed, stays):
        shown(contexts, one)  # there is no list yet
    replace_file(device.cert.parent / REVOKED_FILE, make_crl(fleet_ca.folder, []))
    shown(contexts, removed)
    replace_file(device.cert.parent / REVOKED_FILE, make_crl(fleet_ca.folder, serials))
    shown(contexts, stays)
    assert "certificate revoked" in refusal(contexts, removed)
    replace_file(device.cert.parent / REVOKED_FILE, make_crl(fleet_ca.folder, serials[1:]))  # of a restored cloud
    shown(contexts, removed)


def test_the_list_counts_whatever_the_order_in_which_it_and_a_new_certificate_come(fleet_ca, device):
    replace_file(device.cert.parent / REVOKED_FILE, make_crl(fleet_ca.folder, [serial_of(fleet_ca.device("cam-2"))]))
    contexts = server_contexts(device.cert.parent)
    replace_file(device.cert, device.cert.read_bytes())
    assert "certificate revoked" in refusal(contexts, fleet_ca.device("cam-2"))


def test_no_session_outlives_a_removal(fleet_ca, device):
    """A session that is taken up again would show no certificate."""
    contexts, removed = server_contexts(device.cert.parent), fleet_ca.device("cam-2")
    client = tls.client_context(removed.ca, removed)
    with connected(contexts, client) as connection:
        connection.send(b"x")
        connection.settimeout(30)
        assert connection.recv(1) == b"x"  # by then any ticket would be here
        session = connection.session
    assert session is None or not session.has_ticket


def test_a_list_that_cannot_be_read_lets_nobody_in(fleet_ca, device):
    contexts = server_contexts(device.cert.parent)
    (device.cert.parent / REVOKED_FILE).write_bytes(b"-----BEGIN X509 CRL-----")
    with pytest.raises(OSError, match="PEM"):
        contexts()


def serial_of(identity):
    return tls.serial_number(identity.cert.read_bytes())


@contextlib.contextmanager
def connected(contexts, client):
    """A connection of a client to a server that echoes one byte."""
    ours, theirs = socket.socketpair()

    def serve():
        with theirs, contexts().wrap_socket(theirs, server_side=True) as connection:
            connection.send(connection.recv(1))

    with ThreadPoolExecutor(1) as threads:
        serving = threads.submit(serve)
        with ours, client.wrap_socket(ours, server_hostname="cam-1.device.edgefl.internal") as connection:
            yield connection
        serving.result(30)


def refusal(contexts, identity):
    """Return why a server refuses a client; the client hears of it when it next reads, or that the server has gone."""
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as threads, ours, theirs:
        client = tls.client_context(identity.ca, identity)
        shaking = threads.submit(client.wrap_socket, ours, server_hostname="cam-1.device.edgefl.internal")
        with pytest.raises(ssl.SSLError) as refused:
            contexts().wrap_socket(theirs, server_side=True)
        shaking.result(30).close()
    return str(refused.value)


def shown(contexts, identity):
    """Return the serial number of what a server shows to a client; raises SSLError where it refuses that one."""
    with connected(contexts, tls.client_context(identity.ca, identity)) as connection:
        serial = tls.serial_number(ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True)).encode())
        connection.send(b"x")
        assert connection.recv(1) == b"x"
    return serial
