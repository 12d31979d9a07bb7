"""The list of parents: only what the fleet's key has signed for this device, and never an older one."""

from __future__ import annotations

import pytest

from edge_agent.link.parents import FILE, KnownParents, check_addresses, listed_names, load_fleet_key, parent_name
from edge_agent.link.profile import Profile
from edgefl.errors import HomeError, ManifestRejected, ProtocolError
from edgefl.protocols.manifest import ParentAddress, Parents, new_fleet_key, public_pem, sign

ENROLLED = Profile(device="cam-1", cloud_url="https://10.0.0.1:9480", grpc="10.0.0.1:9440", broker="mqtts://10.0.0.1:1")
KEY = new_fleet_key()


def at(name, host, **other):
    return ParentAddress(
        **{"name": name, "url": f"https://{host}:9480", "grpc": f"{host}:9440", "broker": f"mqtts://{host}:1"} | other
    )


def listed(*parents, sequence=1, device="cam-1", key=KEY):
    return sign(Parents(device=device, sequence=sequence, parents=list(parents)), key)


@pytest.fixture
def known(tmp_path):
    return KnownParents(tmp_path, ENROLLED, KEY.public_key())


def names(known):
    return [(parent_name(one), one.grpc) for one in known.profiles]


def test_without_a_list_there_is_the_parent_of_the_enrolment(tmp_path, known):
    assert known.profiles == [ENROLLED]
    assert listed_names(tmp_path) == []


def test_a_list_is_kept_and_survives_a_restart(tmp_path, known):
    assert known.take(listed(at("oslo", "10.0.0.2"), at("cloud", "10.0.0.1")))
    again = KnownParents(tmp_path, ENROLLED, KEY.public_key())
    assert names(again) == names(known) == [("oslo", "10.0.0.2:9440"), ("cloud", "10.0.0.1:9440")]
    assert again.profiles[0].server_name == "oslo.region.edgefl.internal"
    assert listed_names(tmp_path) == ["oslo", "cloud"]


def test_the_address_of_the_enrolment_stays_in_use_beside_another_of_the_same_parent(known):
    known.take(listed(at("cloud", "cloud.example"), at("oslo", "10.0.0.2")))
    assert names(known) == [("cloud", "10.0.0.1:9440"), ("cloud", "cloud.example:9440"), ("oslo", "10.0.0.2:9440")]


def test_an_older_list_changes_nothing(known):
    known.take(listed(at("oslo", "10.0.0.2"), sequence=5))
    assert not known.take(listed(at("bergen", "10.0.0.3"), sequence=4))
    assert not known.take(listed(at("bergen", "10.0.0.3"), sequence=5))
    assert names(known) == [("oslo", "10.0.0.2:9440")]


@pytest.mark.parametrize(
    ("signed", "reason"),
    [
        (listed(at("oslo", "10.0.0.2"), key=new_fleet_key()), "not signed by the fleet's key"),
        (listed(at("oslo", "10.0.0.2"), device="cam-2"), "is for 'cam-2', not for 'cam-1'"),
    ],
)
def test_a_list_of_another_fleet_or_device_is_refused(tmp_path, known, signed, reason):
    with pytest.raises(ManifestRejected, match=reason):
        known.take(signed)
    assert known.profiles == [ENROLLED]
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"url": "http://h:1"},
        {"url": "https://h"},
        {"grpc": "h"},
        {"grpc": "h:x"},
        {"broker": "mqtt://127.0.0.1:1"},
        {"broker": "x"},
    ],
)
def test_addresses_that_cannot_be_used_are_refused(known, bad):
    with pytest.raises(ProtocolError, match="addresses of parent 'oslo'"):
        known.take(listed(at("oslo", "h", **bad)))
    assert known.profiles == [ENROLLED]


def test_an_empty_list_is_refused():
    with pytest.raises(ProtocolError, match="is empty"):
        check_addresses(Parents(device="cam-1", sequence=1, parents=[]))


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"text": "{}", "key_id": "k", "signature": "s"}'])
def test_a_damaged_file_is_not_used(tmp_path, known, damage):
    known.take(listed(at("oslo", "10.0.0.2")))
    (tmp_path / FILE).write_bytes(damage)
    assert KnownParents(tmp_path, ENROLLED, KEY.public_key()).profiles == [ENROLLED]
    assert listed_names(tmp_path) == []


def test_the_fleets_key_is_in_the_home(tmp_path):
    with pytest.raises(HomeError, match="cannot be read as the fleet's key"):
        load_fleet_key(tmp_path)
    (tmp_path / "fleet.pub").write_bytes(public_pem(KEY))
    assert load_fleet_key(tmp_path).public_bytes_raw() == KEY.public_key().public_bytes_raw()
