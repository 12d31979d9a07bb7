"""Where devices may connect: what the fleet's key signs, when it signs anew, and who is told."""

from __future__ import annotations

import dataclasses

import pytest

from cloud.region.parents import ParentLists, address_of, reached_at, regions_in
from cloud.state.enrolment import Enrolment
from cloud.state.members import Members
from cloud.state.store import open_database
from edgefl.errors import ConfigError, NotFound
from edgefl.protocols.manifest import Parents, new_fleet_key, verify
from edgefl.protocols.tiers import RegionState
from edgefl.protocols.tls import Identity, create_ca, new_request

CLOUD = address_of("cloud", "cloud.example", 9480, 9440, ":8883")
OSLO = RegionState(version="1", parent="cloud", host="10.0.0.7", grpc_port=1, http_port=2, mqtt_port=3)


class Fleet:
    """A database with devices and regions, and the lists that were sent."""

    def __init__(self, folder) -> None:
        create_ca(folder)
        self.folder, self.engine = folder, open_database(folder / "cloud.db")
        self.enrolment, self.members = Enrolment(self.engine, folder), Members(self.engine)
        self.key, self.sent = new_fleet_key(), []
        self.lists = self.open()
        self.members.changed.append(self._refresh)
        for name, role in (("oslo", "region"), ("bergen", "region"), ("cam-1", "device"), ("cam-2", "device")):
            self.enroll(name, role)

    def _refresh(self):
        self.lists.refresh()

    def open(self, cloud=CLOUD):
        return ParentLists(self.engine, self.key, cloud, lambda *sent: self.sent.append(sent))

    def enroll(self, name, role="device", parent="cloud"):
        csr = new_request(Identity.in_folder(self.folder), name)
        self.enrolment.enroll(self.enrolment.new_token(role=role)[5:].partition(".")[0], name, {}, csr, role=role,
                              parent=parent)  # fmt: skip

    def of(self, device):
        signed = self.lists.of(device)
        return None if signed is None else verify(signed, Parents, self.key.public_key())


@pytest.fixture
def fleet(tmp_path):
    return Fleet(tmp_path)


def test_a_device_that_was_never_assigned_has_no_list(fleet):
    assert fleet.of("cam-1") is None
    assert fleet.lists.all() == {}


def test_a_list_has_the_known_addresses_in_their_order(fleet):
    fleet.lists.note_region("oslo", OSLO)
    fleet.members.assign("cam-*", ["oslo", "bergen", "cloud"])
    oslo = address_of("oslo", "10.0.0.7", 2, 1, ":3")
    assert (oslo.url, oslo.grpc, oslo.broker) == ("https://10.0.0.7:2", "10.0.0.7:1", "mqtts://10.0.0.7:3")
    assert fleet.of("cam-1") == Parents(device="cam-1", sequence=1, parents=[oslo, CLOUD])  # bergen never connected
    assert [device for device, _ in fleet.sent] == ["cam-1", "cam-2"]
    assert fleet.of("cam-1").sequence == 1  # asking again signs nothing


def test_an_address_that_changes_is_signed_and_sent_again(fleet):
    fleet.members.assign("cam-1", ["oslo", "cloud"])
    fleet.lists.note_region("oslo", OSLO)
    fleet.lists.note_region("oslo", dataclasses.replace(OSLO, host="10.0.0.8"))
    fleet.lists.note_region("oslo", dataclasses.replace(OSLO, host="10.0.0.8", parent_up_bytes=5))  # no address
    assert fleet.of("cam-1").sequence == 3
    assert fleet.of("cam-1").parents[0].grpc == "10.0.0.8:1"


def test_regions_that_a_device_has_left_get_the_list_too(fleet):
    fleet.lists.note_region("oslo", OSLO)
    fleet.lists.note_region("bergen", OSLO)
    fleet.members.assign("cam-1", ["oslo"])
    fleet.members.assign("cam-1", ["bergen", "cloud"])
    assert fleet.of("cam-1").former == ["oslo"]
    assert regions_in(fleet.lists.of("cam-1")) == {"oslo", "bergen", "cloud"}
    fleet.members.assign("cam-1", ["oslo"])
    assert fleet.of("cam-1").former == ["bergen", "cloud"]


def test_a_region_that_a_device_left_before_its_address_was_known_gets_the_list(fleet):
    fleet.enroll("cam-3", parent="bergen")
    assert fleet.of("cam-3") is None
    fleet.members.assign("cam-3", ["cloud"])
    assert fleet.of("cam-3").former == ["bergen"]


def test_addresses_and_sequences_survive_a_restart(fleet):
    fleet.lists.note_region("oslo", OSLO)
    fleet.members.assign("cam-1", ["oslo", "cloud"])
    fleet.lists = fleet.open()
    assert fleet.of("cam-1").sequence == 1
    fleet.lists = fleet.open(address_of("cloud", "moved.example", 9480, 9440, "mqtts://broker.example:8884"))
    assert fleet.of("cam-1").sequence == 2
    assert fleet.of("cam-1").parents[1].broker == "mqtts://broker.example:8884"


def test_a_device_that_enrolled_through_a_region_has_a_list(fleet):
    fleet.lists.note_region("oslo", OSLO)
    fleet.enroll("cam-3", parent="oslo")
    assert [one.name for one in fleet.of("cam-3").parents] == ["oslo"]


def test_what_cannot_be_assigned_is_refused_and_changes_nothing(fleet):
    with pytest.raises(ConfigError, match=r"paris: no region of this fleet. Its regions: bergen, oslo"):
        fleet.members.assign("cam-*", ["oslo", "paris"])
    with pytest.raises(ConfigError, match="each once"):
        fleet.members.assign("cam-*", ["oslo", "oslo"])
    with pytest.raises(ConfigError, match="expected 1 to 16"):
        fleet.members.assign("cam-*", [])
    with pytest.raises(NotFound, match="no device matches 'oslo'"):  # a region's parent is the one that it enrolled at
        fleet.members.assign("oslo", ["bergen"])
    assert fleet.sent == []


def test_a_server_on_all_addresses_is_reached_by_its_hosts_name():
    assert reached_at("::") not in {"", "::"}
    assert reached_at("oslo.example") == "oslo.example"
    assert address_of("oslo", "::1", 2, 1, ":3").grpc == "[::1]:1"
