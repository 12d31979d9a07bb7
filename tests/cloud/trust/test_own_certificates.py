"""A server's certificate is made anew where it does not fit, and only there; the key stays while it can be used."""

import datetime

import pytest
from cryptography import x509

from cloud.trust.own_certificates import hosts_of, renew_ca, renew_server
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity

HOSTS = ["localhost", "127.0.0.1", "0:0::1"]


@pytest.fixture
def ours(tmp_path):
    tls.create_ca(tmp_path)
    identity = Identity.in_folder(tmp_path)
    tls.issue_server(tmp_path, identity, HOSTS)
    return identity


def renew(ours, hosts=HOSTS, days=tls.LEAF_DAYS):
    """Whether it was renewed, and whether the key is another one now."""
    key = ours.key.read_bytes() if ours.key.exists() else b""
    renewed = renew_server(ours.ca.parent, ours, hosts, "cloud", days)
    assert not renew_server(ours.ca.parent, ours, hosts, "cloud", days)  # once is enough
    tls.server_context(ours, client_certificates=True)  # key and certificate go together
    return renewed, ours.key.read_bytes() != key


def certificate(ours):
    return x509.load_pem_x509_certificate(ours.cert.read_bytes())


def test_one_that_fits_stays(ours):
    assert renew(ours) == (False, False)
    assert renew(ours, ["127.0.0.1"]) == (False, False)  # an address that went may come again


def test_another_host_is_put_in_with_the_same_key(ours):
    assert renew(ours, [*HOSTS, "cloud.example.org"]) == (True, False)
    assert set(hosts_of(certificate(ours))) == {"localhost", "127.0.0.1", "::1", "cloud.example.org"}
    assert tls.common_name(ours.cert.read_bytes()) == "cloud"


@pytest.mark.parametrize(("days_left", "renewed"), [(-1, True), (0.2, True), (130, True), (135, False), (4000, False)])
def test_less_than_a_third_of_a_lifetime_left_is_too_little(ours, days_left, renewed):
    tls.issue_server(ours.ca.parent, ours, HOSTS, days=days_left)
    assert renew(ours) == (renewed, False)


def test_one_that_begins_late_is_renewed_since_a_clock_may_be_behind(ours, monkeypatch):
    with monkeypatch.context() as before:
        now = datetime.datetime.now(datetime.UTC)
        before.setattr(tls, "BEGIN", now - datetime.timedelta(days=1))
        tls.issue_server(ours.ca.parent, ours, HOSTS)
    assert renew(ours) == (True, False)
    assert certificate(ours).not_valid_before_utc == tls.BEGIN


def test_one_of_a_cloud_whose_clock_was_ahead_is_renewed(ours, monkeypatch):
    with monkeypatch.context() as ahead:
        ahead.setattr(tls, "BEGIN", datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=800))
        tls.issue_server(ours.ca.parent, ours, HOSTS, days=1200)
    assert renew(ours) == (True, False)


@pytest.mark.parametrize("damage", ["no key", "no certificate", "another key", "no PEM", "another CA"])
def test_a_pair_that_cannot_be_used_is_made_anew(ours, damage, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tls.create_ca(other)
    tls.issue_server(other, Identity.in_folder(other), HOSTS)
    if damage == "no key":
        ours.key.unlink()
    elif damage == "no certificate":
        ours.cert.unlink()
    elif damage == "another key":
        ours.key.write_bytes((other / "key.pem").read_bytes())
    elif damage == "no PEM":
        ours.cert.write_bytes(b"\0\0")
    else:
        for name in ("key.pem", "cert.pem"):
            (tmp_path / name).write_bytes((other / name).read_bytes())
    assert renew(ours) == (True, True)


def test_a_cas_new_certificate_is_good_for_all_that_it_has_signed(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        now = datetime.datetime.now(datetime.UTC)
        before.setattr(tls, "BEGIN", now - datetime.timedelta(days=1))
        before.setattr(tls, "NO_END", now + datetime.timedelta(days=3650))
        tls.create_ca(tmp_path)
    former = tls.load_ca(tmp_path)[0]
    ours = Identity.in_folder(tmp_path)
    tls.issue_server(tmp_path, ours, HOSTS)
    leaf = certificate(ours)
    assert renew_ca(tmp_path)
    assert not renew_ca(tmp_path)
    ca = tls.load_ca(tmp_path)[0]
    assert (ca.not_valid_before_utc, ca.not_valid_after_utc) == (tls.BEGIN, tls.NO_END)
    leaf.verify_directly_issued_by(ca)  # what the former one signed
    tls.issue_server(tmp_path, ours, HOSTS)
    certificate(ours).verify_directly_issued_by(former)  # a device that has the former one
