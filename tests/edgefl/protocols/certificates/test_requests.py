"""A request for a certificate proves whose it is, whoever passes it on."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edgefl.errors import ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.certificates.requests import owner_of, signed_request


class Device:
    """A device with a certificate, and the request for its next one."""

    def __init__(self, folder, ca, domain=tls.DEVICE_DOMAIN) -> None:
        folder.mkdir()
        self.key = tls.saved_key(folder / "key.pem")
        self.certificate = tls.sign_request(ca, tls.request_for(self.key, "cam-1"), "cam-1", domain=domain)
        self.csr = tls.request_for(tls.saved_key(folder / "next.key"), "cam-1")


@pytest.fixture
def ca(tmp_path):
    (tmp_path / "ca").mkdir()
    tls.create_ca(tmp_path / "ca")
    return tmp_path / "ca"


@pytest.fixture
def device(tmp_path, ca):
    return Device(tmp_path / "cam-1", ca)


def top(ca):
    return tls.load_certificate((ca / "ca.pem").read_bytes())


def test_a_devices_own_request_names_it(ca, device):
    request = signed_request(device.csr, device.certificate, device.key)
    assert owner_of(pb.RenewRequest.FromString(request.SerializeToString()), top(ca)) == "cam-1"


def test_a_region_cannot_put_in_its_own_key(ca, device):
    request = signed_request(device.csr, device.certificate, device.key)
    mine = tls.request_for(ec.generate_private_key(ec.SECP256R1()), "cam-1")
    with pytest.raises(ProtocolError, match="not signed by the key of 'cam-1'"):
        owner_of(pb.RenewRequest(csr=mine, certificate=request.certificate, signature=request.signature), top(ca))
    with pytest.raises(ProtocolError, match="not signed by the key"):
        owner_of(signed_request(mine, device.certificate, ec.generate_private_key(ec.SECP256R1())), top(ca))


def test_a_region_asks_for_itself(tmp_path, ca):
    region = Device(tmp_path / "oslo", ca, tls.REGION_DOMAIN)
    assert owner_of(signed_request(region.csr, region.certificate, region.key), top(ca)) == "cam-1"


@pytest.mark.parametrize("certificate", [b"", b"-----BEGIN CERTIFICATE-----", b"\xff\xfe"])
def test_what_is_no_certificate_is_refused(ca, device, certificate):
    with pytest.raises(ProtocolError, match="no certificate of this fleet's CA"):
        owner_of(signed_request(device.csr, certificate, device.key), top(ca))


def test_a_certificate_of_another_fleet_is_refused(tmp_path, ca, device):
    other = tmp_path / "other"
    other.mkdir()
    tls.create_ca(other)
    with pytest.raises(ProtocolError, match="no certificate of this fleet's CA"):
        owner_of(signed_request(device.csr, device.certificate, device.key), top(other))
