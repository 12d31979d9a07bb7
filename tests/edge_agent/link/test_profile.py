"""Who a device is, on the disk."""

from __future__ import annotations

import pytest

from edge_agent.link.profile import Profile, cloud_host, load_profile, save_profile, with_broker, with_host
from edgefl.errors import ConfigError, HomeError, ProtocolError
from edgefl.process.home import create_home

PROFILE = Profile(
    device="cam-1", cloud_url="https://c:9480", grpc="c:9440", broker="mqtts://c:8883", tags={"site": "oslo"}
)


def test_a_profile_survives(tmp_path):
    create_home(tmp_path, "agent")
    save_profile(tmp_path, PROFILE)
    assert load_profile(tmp_path) == PROFILE
    assert not PROFILE.insecure


def test_homes_that_are_none(tmp_path):
    with pytest.raises(HomeError, match="edgefl agent enroll"):
        load_profile(tmp_path)
    create_home(tmp_path, "agent")
    with pytest.raises(HomeError, match="is not enrolled"):
        load_profile(tmp_path)
    (tmp_path / "agent.json").write_text("{")
    with pytest.raises(HomeError, match="is damaged"):
        load_profile(tmp_path)


def test_a_home_made_by_a_newer_version(tmp_path):
    create_home(tmp_path, "agent")
    (tmp_path / "home.json").write_text('{"kind": "agent", "format": 99, "made_by": "9.0"}')
    with pytest.raises(HomeError, match=r"made by edgefl 9.0"):
        load_profile(tmp_path)


@pytest.mark.parametrize(
    ("url", "host"),
    [("https://c.example:9480", "c.example"), ("https://[::1]:9480", "::1"), ("http://localhost:1", "localhost"),
     ("http://127.0.0.1:1", "127.0.0.1")],
)  # fmt: skip
def test_the_host_of_a_cloud(url, host):
    assert cloud_host(url) == host


@pytest.mark.parametrize("url", ["", "c:9480", "https://", "ftp://c", "http://c.example:1", "http://10.0.0.1:1"])
def test_a_url_that_is_no_cloud(url):
    with pytest.raises(ConfigError):
        cloud_host(url)


def test_a_broker_without_a_host_is_the_clouds():
    assert with_host("mqtts://:8883", "c") == "mqtts://c:8883"
    assert with_host("mqtts://:8883", "::1") == "mqtts://[::1]:8883"
    assert with_host("mqtts://b:8883", "c") == "mqtts://b:8883"
    assert with_broker(PROFILE, "mqtts://:1").broker == "mqtts://c:1"
    assert with_broker(PROFILE, "") is PROFILE
    for wrong in ("https://b:1", "mqtts://b", "b:8883"):
        with pytest.raises(ProtocolError):
            with_host(wrong, "c")
