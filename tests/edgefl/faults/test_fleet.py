"""Fleets of a simulation: parents exist, and the homes are those that enrolment would make."""

from __future__ import annotations

import sqlite3

import pytest

from cloud.region.server.enrolment import load_profile as load_region
from edge_agent.link.profile import load_profile
from edgefl.faults.fleet import DEEP, TOPOLOGIES, make_homes
from edgefl.protocols import tls


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=list(TOPOLOGIES))
def test_each_parent_is_a_server_with_ports_of_its_own(topology):
    assert {*topology.regions.values(), *topology.devices.values()} <= {*topology.servers}
    ports = [port for name in topology.servers for port in topology.ports(name)]
    assert len({*ports}) == len(ports)


def test_the_homes_are_enrolled(tmp_path):
    make_homes(DEEP, tmp_path)
    device, region = load_profile(tmp_path / "d3"), load_region(tmp_path / "r2")
    assert (device.region, device.server_name) == ("r2", "r2" + tls.REGION_DOMAIN)
    assert region.parent_name == "r1"
    assert tls.is_region((tmp_path / "r2" / "tls" / "cert.pem").read_bytes())
    db = sqlite3.connect(tmp_path / "cloud" / "cloud.db")
    known = dict(db.execute("SELECT name, parents FROM devices").fetchall())
    db.close()
    assert known.keys() == {*DEEP.regions, *DEEP.devices}
    assert known["d3"] == '["r2"]'
