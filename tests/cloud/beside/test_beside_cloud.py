"""What servers beside a cloud have in common; that they serve enrolled devices alone is tested with each of them."""

from __future__ import annotations

import pytest
from cryptography import x509

from cloud.beside.beside_cloud import BesideCloud, refuse_insecure
from cloud.trust.own_certificates import hosts_of
from edgefl.errors import ConfigError, HomeError
from edgefl.process.home import create_home


def test_its_certificate_names_where_devices_reach_it_and_is_kept(home) -> None:
    identity = BesideCloud(home, "0.0.0.0", 9999, names=["cloud.example.org"]).certified("stage")  # noqa: S104 - tested
    first = identity.cert.read_bytes()
    hosts = hosts_of(x509.load_pem_x509_certificate(first))
    assert {"cloud.example.org", "localhost", "127.0.0.1"} <= set(hosts)
    assert "0.0.0.0" not in hosts  # noqa: S104 - an address of no machine
    assert identity.key.parent == home / "stages" / "stage"
    BesideCloud(home, "127.0.0.1", 9999).certified("stage")
    assert identity.cert.read_bytes() == first
    BesideCloud(home, "127.0.0.1", 9999, names=["other.example.org"]).certified("stage")
    assert "other.example.org" in hosts_of(x509.load_pem_x509_certificate(identity.cert.read_bytes()))


def test_it_needs_the_home_of_a_cloud_that_has_been_started(tmp_path) -> None:
    with pytest.raises(HomeError):
        BesideCloud(tmp_path / "none", "127.0.0.1", 9999)
    create_home(tmp_path / "empty", "cloud")
    with pytest.raises(HomeError, match=r"has no CA yet; start its cloud first: `edgefl cloud start`"):
        BesideCloud(tmp_path / "empty", "127.0.0.1", 9999)


def test_without_tls_only_loopback_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"--insecure is for loopback only, --host is 10.0.0.1"):
        refuse_insecure("10.0.0.1", insecure=True)
    refuse_insecure("10.0.0.1", insecure=False)
    refuse_insecure("localhost", insecure=True)
