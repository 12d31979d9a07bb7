"""The next certificate of a device or a region: asked for with one key until it comes, installed whole or not."""

from __future__ import annotations

import pytest

from edgefl.errors import ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.certificates.own import NEXT_KEY, install, next_request
from edgefl.protocols.certificates.requests import owner_of
from edgefl.protocols.tls import DEVICE_DOMAIN, REGION_DOMAIN, Identity


class Member:
    """A folder with the certificate of a device or a region, and the CA that has signed it."""

    def __init__(self, folder, domain):
        self.ca, self.folder, self.domain = folder / "ca", folder / "tls", domain
        for one in (self.ca, self.folder):
            one.mkdir()
        tls.create_ca(self.ca)
        self.identity = Identity.in_folder(self.folder)
        self.identity.ca.write_bytes((self.ca / "ca.pem").read_bytes())
        self.identity.cert.write_bytes(self.signed(tls.new_request(self.identity, "m")))

    def signed(self, csr, name="m", domain=""):
        return tls.sign_request(self.ca, csr, name, domain=domain or self.domain)

    def files(self):
        return self.identity.key.read_bytes(), self.identity.cert.read_bytes()


@pytest.fixture(params=[DEVICE_DOMAIN, REGION_DOMAIN])
def member(request, tmp_path):
    return Member(tmp_path, request.param)


def test_a_key_is_made_once_and_installed_with_its_certificate(member):
    request, before = next_request(member.folder, "m"), member.files()
    assert owner_of(request, tls.load_certificate(member.identity.ca.read_bytes())) == "m"
    assert tls.x509.load_pem_x509_csr(next_request(member.folder, "m").csr).public_key() == (
        tls.x509.load_pem_x509_csr(request.csr).public_key()
    )
    certificate = member.signed(request.csr)
    install(member.folder, "m", pb.RenewReply(certificate=certificate, ca=member.identity.ca.read_bytes()))
    key, held = member.files()
    assert (held, key != before[0]) == (certificate, True)
    assert tls.load_key(member.identity.key).public_key() == tls.load_certificate(held).public_key()
    assert not (member.folder / NEXT_KEY).exists()


def test_what_is_not_its_own_is_refused_and_changes_nothing(member, tmp_path):
    csr, before = next_request(member.folder, "m").csr, member.files()
    other = REGION_DOMAIN if member.domain == DEVICE_DOMAIN else DEVICE_DOMAIN
    (tmp_path / "strange").mkdir()
    tls.create_ca(tmp_path / "strange")
    strange = Identity.in_folder(tmp_path)
    for certificate, words in (
        (member.signed(csr, "n"), "names 'n', not 'm'"),
        (member.signed(csr, domain=other), "the new certificate is a"),
        (member.signed(tls.new_request(strange, "m")), "is not for this device's key"),
        (tls.sign_request(tmp_path / "strange", csr, "m", domain=member.domain), "not signed by this fleet's CA"),
    ):
        with pytest.raises(ProtocolError, match=words):
            install(member.folder, "m", pb.RenewReply(certificate=certificate))
    with pytest.raises(ValueError, match=r"."):
        install(member.folder, "m", pb.RenewReply(certificate=b"none"))
    assert member.files() == before
    install(member.folder, "m", pb.RenewReply(certificate=member.signed(csr)))
