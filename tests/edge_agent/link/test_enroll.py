"""Enrolment against the real cloud's HTTPS plane."""

from __future__ import annotations

import stat

import pytest

from edge_agent.link.enroll import EnrolmentRequest, enroll
from edge_agent.link.profile import load_profile
from edgefl.errors import CloudUnreachable, ConfigError, EnrolmentRefused, HomeError, ProtocolError
from edgefl.protocols import tls
from edgefl.protocols.manifest import load_public_key


@pytest.fixture
def make_request(http_plane):
    def make(**changes) -> EnrolmentRequest:
        facts = {
            "cloud": http_plane.url,
            "token": http_plane.enrolment.new_token(),
            "name": "cam-1",
            "tags": {"a": "b"},
        }
        return EnrolmentRequest(**{**facts, **changes})

    return make


def test_a_device_becomes_a_member(http_plane, make_request, tmp_path):
    home = tmp_path / "agent"
    profile = enroll(home, make_request())
    assert load_profile(home) == profile
    assert (profile.device, profile.grpc, profile.broker) == ("cam-1", "127.0.0.1:9440", "mqtts://127.0.0.1:8883")
    assert profile.tags == {"a": "b"}
    assert stat.S_IMODE((home / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert tls.common_name((home / "cert.pem").read_bytes()) == "cam-1"
    load_public_key((home / "fleet.pub").read_bytes())
    tls.client_context(home / "ca.pem", tls.Identity.in_folder(home))  # key and certificate belong together
    assert {file.name for file in home.iterdir()} == {
        "home.json", "agent.json", "key.pem", "cert.pem", "ca.pem", "fleet.pub",
    }  # fmt: skip
    assert [device.name for device in http_plane.enrolment.devices()] == ["cam-1"]


def test_an_enrolled_home_refuses_and_keeps_the_token(make_request, tmp_path):
    home = tmp_path / "agent"
    enroll(home, make_request())
    second = make_request(name="cam-2")
    with pytest.raises(HomeError, match="is enrolled already"):
        enroll(home, second)
    enroll(tmp_path / "other", second)


def test_a_token_works_once(make_request, tmp_path):
    first = make_request()
    enroll(tmp_path / "one", first)
    with pytest.raises(EnrolmentRefused, match="used"):
        enroll(tmp_path / "two", make_request(token=first.token, name="cam-2"))
    assert not (tmp_path / "two").exists()


def test_an_expired_token(http_plane, make_request, tmp_path):
    late = make_request()
    http_plane.clock.advance(25 * 3600)
    with pytest.raises(EnrolmentRefused, match="expired"):
        enroll(tmp_path / "agent", late)
    assert not (tmp_path / "agent").exists()


def test_a_token_of_another_fleet_meets_someone_else(make_request, strange_ca, tmp_path):
    token = tls.token_for("secret", strange_ca.cloud.ca.read_bytes())
    with pytest.raises(EnrolmentRefused, match="another server answers"):
        enroll(tmp_path / "agent", make_request(token=token))
    assert not (tmp_path / "agent").exists()


@pytest.mark.parametrize("name", ["", "Cam", "a b", "cloud", "../x", "x" * 65])
def test_a_name_that_cannot_be(make_request, tmp_path, name):
    with pytest.raises(EnrolmentRefused, match="--name"):
        enroll(tmp_path / "agent", make_request(name=name))


@pytest.mark.parametrize("token", ["", "efl1.only-half", "x.y.z"])
def test_a_token_that_is_none(make_request, tmp_path, token):
    with pytest.raises(ProtocolError, match="copy the complete token"):
        enroll(tmp_path / "agent", make_request(token=token))


@pytest.mark.parametrize("cloud", ["cloud.example:9480", "ftp://cloud", "http://cloud.example:9480"])
def test_a_cloud_that_cannot_be(make_request, tmp_path, cloud):
    with pytest.raises(ConfigError, match="--cloud"):
        enroll(tmp_path / "agent", make_request(cloud=cloud))


def test_a_cloud_that_does_not_answer_leaves_nothing(make_request, tmp_path):
    existing = tmp_path / "made-before"
    existing.mkdir()
    for home in (tmp_path / "new", existing):
        with pytest.raises(CloudUnreachable, match="did not answer"):
            enroll(home, make_request(cloud="https://127.0.0.1:1"))
    assert not (tmp_path / "new").exists()
    assert [file.name for file in existing.iterdir()] in ([], ["home.json"])
    enroll(existing, make_request())


def test_a_folder_with_other_things_is_refused(make_request, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(HomeError, match="not empty"):
        enroll(tmp_path / "full", make_request())
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["letter.txt"]
