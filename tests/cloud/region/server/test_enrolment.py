"""How a machine becomes a region, against the cloud's real HTTPS plane."""

from __future__ import annotations

import json
import stat

import pytest

from cloud.region.server.enrolment import FILE, enroll_region, load_profile
from edgefl.errors import ConfigError, EnrolmentRefused, HomeError
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity


@pytest.fixture
def token(http_plane):
    return http_plane.enrolment.new_token(role="region")


def test_a_machine_becomes_a_region(http_plane, token, tmp_path):
    home = tmp_path / "north"
    profile = enroll_region(home, http_plane.url + "/", token, "north")
    assert (profile.name, profile.parent_url, profile.parent_grpc) == ("north", http_plane.url, "127.0.0.1:9440")
    assert (profile.parent_name, profile.server_name) == ("cloud", "")
    assert load_profile(home) == profile
    keys = Identity.in_folder(home / "tls")
    certificate = keys.cert.read_bytes()
    assert tls.is_region(certificate)
    assert tls.common_name(certificate) == "north"
    assert stat.S_IMODE(keys.key.stat().st_mode) == 0o600
    assert {file.name for file in home.iterdir()} == {"home.json", "region.json", "fleet.pub", "tls"}
    assert enroll_region(home, "", "", "") == profile  # a later start needs nothing
    assert enroll_region(home, http_plane.url, "spent", "north") == profile


@pytest.mark.parametrize(
    ("parent", "name"), [("", "south"), ("https://elsewhere:1", ""), ("https://elsewhere:1", "north")]
)
def test_a_home_stays_the_home_of_its_region(http_plane, token, tmp_path, parent, name):
    enroll_region(tmp_path / "north", http_plane.url, token, "north")
    with pytest.raises(ConfigError, match="is the home of region 'north' below"):
        enroll_region(tmp_path / "north", parent, "", name)


def test_two_regions_of_one_name(http_plane, token, tmp_path):
    enroll_region(tmp_path / "one", http_plane.url, token, "north")
    second = http_plane.enrolment.new_token(role="region")
    with pytest.raises(EnrolmentRefused, match="'north' is enrolled already"):
        enroll_region(tmp_path / "two", http_plane.url, second, "north")
    assert enroll_region(tmp_path / "two", http_plane.url, second, "south").name == "south"  # the token is still good


def test_a_token_for_a_device_makes_no_region(http_plane, tmp_path):
    with pytest.raises(EnrolmentRefused, match="the token is for a device, and 'north' enrols as a region"):
        enroll_region(tmp_path / "north", http_plane.url, http_plane.enrolment.new_token(), "north")
    assert not (tmp_path / "north" / FILE).exists()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"parent": ""}, ConfigError, "--parent"),
        ({"parent": "http://cloud:9480"}, ConfigError, "https://host:port"),
        ({"parent": "cloud:9480"}, ConfigError, "--parent"),
        ({"name": ""}, EnrolmentRefused, "--name"),
        ({"name": "cloud"}, EnrolmentRefused, "reserved"),
        ({"name": "North"}, EnrolmentRefused, "--name"),
        ({"token": ""}, EnrolmentRefused, "cloud token --role region"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(token, tmp_path, changes, error, match):
    facts = {"parent": "https://cloud:9480", "token": token, "name": "north"} | changes
    with pytest.raises(error, match=match):
        enroll_region(tmp_path / "north", **facts)
    assert not (tmp_path / "north").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", json.dumps({"name": "north"})])
def test_a_damaged_profile(http_plane, token, tmp_path, damage):
    enroll_region(tmp_path / "north", http_plane.url, token, "north")
    (tmp_path / "north" / FILE).write_text(damage)
    with pytest.raises(HomeError, match=r"region\.json is damaged"):
        load_profile(tmp_path / "north")


@pytest.mark.parametrize("other", ["device", "region"])
def test_a_home_with_the_certificate_of_another(http_plane, token, tmp_path, other):
    enroll_region(tmp_path / "north", http_plane.url, token, "north")
    keys = Identity.in_folder(tmp_path / "north" / "tls")
    secret, _ = tls.parse_token(http_plane.enrolment.new_token(role=other))
    request = tls.new_request(keys, "other")
    keys.cert.write_bytes(http_plane.enrolment.enroll(secret, "other", {}, request, role=other))
    with pytest.raises(HomeError, match=f"is the certificate of the {other} 'other', not of the region 'north'"):
        enroll_region(tmp_path / "north", "", "", "")
