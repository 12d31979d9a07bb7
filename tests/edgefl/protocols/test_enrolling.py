"""How a token becomes a certificate, against the real HTTPS plane: pinned to its CA, patient with a busy cloud."""

from __future__ import annotations

import contextlib
import http.server
import threading

import pytest

from edgefl.errors import CloudUnreachable, EnrolmentRefused, ProtocolError
from edgefl.protocols import tls
from edgefl.protocols.enrolling import CUT_OFF_WAIT_S, _call, apply_for_certificate
from edgefl.protocols.tls import Identity


@pytest.fixture
def keys(tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir()
    return Identity.in_folder(folder)


@pytest.mark.parametrize(("role", "is_region"), [("device", False), ("region", True)])
def test_a_token_becomes_the_certificate_of_its_role(http_plane, keys, role, is_region):
    token = http_plane.enrolment.new_token(role=role)
    reply = apply_for_certificate(http_plane.url, token, "north", {"site": "n"}, keys, role=role)
    assert tls.common_name(reply.certificate.encode()) == "north"
    assert tls.is_region(reply.certificate.encode()) is is_region
    assert (reply.grpc_port, reply.broker, reply.server) == (9440, "mqtts://:8883", "")
    keys.cert.write_text(reply.certificate)
    tls.client_context(keys.ca, keys)  # the key was made here and fits


def test_a_token_for_another_role_is_refused_and_stays_good(http_plane, keys):
    token = http_plane.enrolment.new_token(role="region")
    with pytest.raises(EnrolmentRefused, match="the token is for a region, and 'north' enrols as a device"):
        apply_for_certificate(http_plane.url, token, "north", {}, keys)
    apply_for_certificate(http_plane.url, token, "north", {}, keys, role="region")


def test_another_server_at_the_address_gets_no_secret(http_plane, strange_ca, keys):
    token = tls.token_for("secret", strange_ca.cloud.ca.read_bytes())
    with pytest.raises(EnrolmentRefused, match="another server answers"):
        apply_for_certificate(http_plane.url, token, "north", {}, keys)
    assert not keys.key.exists()


def test_a_text_that_is_no_token(http_plane, keys):
    with pytest.raises(ProtocolError, match="copy the complete token"):
        apply_for_certificate(http_plane.url, "x.y.z", "north", {}, keys)


def test_nobody_at_the_address(http_plane, keys):
    with pytest.raises(CloudUnreachable, match="did not answer"):
        apply_for_certificate("https://127.0.0.1:1", http_plane.enrolment.new_token(), "north", {}, keys)


CUT_OFF = 0  # the connection ends without an answer


class Busy(http.server.BaseHTTPRequestHandler):
    """Refuses as often as its server says, then answers."""

    def do_GET(self):
        status = self.server.refusals.pop(0) if self.server.refusals else 200
        if status == CUT_OFF:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Retry-After", "7")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("refusals", "error"),
    [
        ([], None),
        ([503, 429], None),
        ([503] * 6, EnrolmentRefused),
        ([CUT_OFF, 503], None),
        ([CUT_OFF] * 6, CloudUnreachable),
    ],
)
def test_a_cloud_that_has_no_place_now_is_asked_again(refusals, error):
    waits = []
    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as server:
        server.refusals = list(refusals)
        expected = [CUT_OFF_WAIT_S if one == CUT_OFF else 7.0 for one in refusals[:5]]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(error) if error else contextlib.nullcontext():
                _call("GET", f"http://127.0.0.1:{server.server_port}/", verify=True, wait=waits.append)
        finally:
            server.shutdown()
            thread.join()
    assert waits == expected
