"""The versions of two tiers: what is spoken, and whom the refusal tells to update."""

from __future__ import annotations

import pytest

from edgefl.process.version import __version__
from edgefl.protocols.tiers import version
from edgefl.protocols.tiers.version import stated, version_fault


def test_one_version_is_spoken_by_both():
    assert version_fault("region 'r1'", "the cloud", stated()) == ""
    assert version_fault("region 'r1'", "the cloud", [*stated(), ("user-agent", "grpc")]) == ""


@pytest.mark.parametrize("metadata", [None, (), [("edgefl-tier-protocol", "")], [("edgefl-tier-protocol", "-1")]])
def test_a_peer_that_states_none_is_the_older_one(metadata):
    assert version_fault("region 'r1'", "the cloud", metadata) == (
        "region 'r1' runs edgefl of an unknown version and speaks version 0 of the protocol of regions; the cloud runs "
        f"edgefl {__version__} and speaks version 1. Update region 'r1': `pip install --upgrade edgefl-fleet`, then "
        "start it again"
    )


def test_of_a_newer_peer_this_side_is_the_older_one():
    fault = version_fault("the parent x:1", "region 'r1'", [("edgefl-tier-protocol", "2"), ("edgefl-version", "3.0")])
    assert fault.startswith("the parent x:1 runs edgefl 3.0 and speaks version 2 ")
    assert "Update region 'r1':" in fault


def test_a_range_of_versions_is_named(monkeypatch):
    monkeypatch.setattr(version, "PROTOCOL", 3)
    monkeypatch.setattr(version, "LEAST", 2)
    assert version_fault("a", "b", [("edgefl-tier-protocol", "2")]) == ""
    assert "speaks version 2 to 3. Update a:" in version_fault("a", "b", [("edgefl-tier-protocol", "1")])
    assert "Update b:" in version_fault("a", "b", [("edgefl-tier-protocol", "4")])
