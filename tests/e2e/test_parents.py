"""Devices with several parents: they leave one that is lost, are counted once, and come back."""

import json
import time

import numpy as np
import pytest

from edge_agent.link.enroll import EnrolmentRequest
from edge_agent.link.enroll import enroll as enroll_device
from edgefl.errors import CloudRefused, NotFound, ProcessFailed
from edgefl.operator.client import CloudClient, load_credentials
from tests.e2e.test_faults import calls, wait_for_calls

LEASE = ("--parent-lease-s", "2")
SLACK = ("rounds.quorum=3", "rounds.clients=3", "rounds.offline_grace_s=60", "rounds.deadline_s=200")
DATA = {"a": {"delta": 1, "weight": 1, "seconds": 0}, "b": {"delta": 4, "weight": 2, "seconds": 0},
        "c": {"delta": 7, "weight": 5, "seconds": 0}}  # fmt: skip
MEAN = (1 * 1 + 2 * 4 + 5 * 7) / 8  # of one round


def start(fleet, name, folder, seconds=0.0):
    options = DATA[name] | {"seconds": seconds, "calls": folder / f"{name}.calls"}
    data = [part for key, value in options.items() for part in ("--data", f"{key}={value}")]
    agent = fleet.start_agent(name, *LEASE, *data)
    agent.wait_for("mqtt.up")
    return agent


def client(fleet):
    return CloudClient(None, load_credentials(fleet.credentials))


def assign(fleet, pattern, *parents):
    with client(fleet) as cloud:
        return cloud.assign_devices(pattern, parents)


def shown(fleet):
    with client(fleet) as cloud:
        return {one["name"]: one for one in cloud.devices()}


def enroll(fleet, name, region=""):
    with client(fleet) as cloud:
        token = cloud.new_token(3600)
    home = fleet.folder / name
    enroll_device(home, EnrolmentRequest(cloud=fleet.url_of(region), token=token, name=name))
    return home


def status(fleet, name):
    return json.loads(fleet.command("agent", "status", "--home", fleet.folder / name, "--json", "-"))


@pytest.fixture
def regions(builtin_fleet):
    """A cloud with two regions; device a is enrolled through the first, b and c at the cloud."""
    fleet = builtin_fleet
    for region in ("r1", "r2"):
        fleet.start_region(region)
    enroll(fleet, "a", "r1")
    enroll(fleet, "b")
    enroll(fleet, "c")
    assert assign(fleet, "a", "r1", "r2", "cloud") == {"devices": ["a"], "parents": ["r1", "r2", "cloud"]}
    return fleet


def test_a_device_of_a_killed_region_is_counted_once_and_comes_back(regions, tmp_path):
    fleet = regions
    agent = start(fleet, "a", tmp_path, seconds=6)
    agent.wait_for("parents.new")
    for name in ("b", "c"):
        start(fleet, name, tmp_path)
    run = fleet.start_run("numbers", *SLACK, rounds=2)
    wait_for_calls(tmp_path / "a.calls", 1)
    fleet.regions["r1"].kill()  # while its device trains
    moved = agent.wait_for("parent.changed before=r1 parent=r2")
    agent.wait_for("update.stored", after=moved)
    result, model = fleet.finish_run(run)
    np.testing.assert_allclose(model["w"], np.full(3, 2 * MEAN), rtol=1e-6)  # as in a flat fleet
    assert [entry["admitted"] for entry in result["rounds"]] == [3, 3]
    assert calls(tmp_path / "a.calls") == 2  # nothing was trained again
    assert shown(fleet)["a"]["via"] == "r2"
    assert (status(fleet, "a")["parent"], status(fleet, "a")["parents"]) == ("r2", ["r1", "r2", "cloud"])
    fleet.start_region("r1")
    agent.wait_for("parent.changed before=r2 parent=r1", after=moved)
    again, _ = fleet.run_task("numbers", *SLACK)
    assert again["rounds"][0]["admitted"] == 3
    assert shown(fleet)["a"]["via"] == "r1"


@pytest.mark.soak
def test_a_region_that_is_killed_with_an_acknowledged_update_loses_nothing(regions, tmp_path):
    fleet = regions
    agent = start(fleet, "a", tmp_path)
    agent.wait_for("parents.new")
    start(fleet, "b", tmp_path, seconds=0)
    start(fleet, "c", tmp_path, seconds=15)
    assign(fleet, "c", "r1")  # the sum of r1 waits for c, which has the update of a
    fleet.agents["c"].wait_for("parent.changed before=cloud parent=r1")
    run = fleet.start_run("numbers", *SLACK)
    agent.wait_for("update.stored")
    fleet.regions["r1"].kill()
    agent.wait_for("parent.changed before=r1 parent=r2")
    fleet.start_region("r1")
    result, model = fleet.finish_run(run)
    np.testing.assert_allclose(model["w"], np.full(3, MEAN), rtol=1e-6)
    assert [entry["admitted"] for entry in result["rounds"]] == [3]


def test_a_device_is_told_by_the_region_that_it_may_not_use_any_more(regions, tmp_path):
    fleet = regions
    agent = start(fleet, "a", tmp_path)
    agent.wait_for("parents.new")
    assign(fleet, "a", "r2")
    agent.wait_for("parent.changed before=r1 parent=r2")
    agent.wait_for("mqtt.up", after=agent.wait_for("parent.changed"))
    agent.stop()
    assign(fleet, "a", "r1")  # while it is away: the region that it asks next tells it
    agent = start_anew(fleet, tmp_path)
    agent.wait_for("parent.changed before=r2 parent=r1")


def start_anew(fleet, folder):
    options = [part for key, value in DATA["a"].items() for part in ("--data", f"{key}={value}")]
    return fleet.start_agent("a", *LEASE, *options, "--data", f"calls={folder / 'a.calls'}")


def test_what_cannot_be_assigned_is_refused(regions):
    with pytest.raises(CloudRefused, match=r"paris: no region of this fleet. Its regions: r1, r2"):
        assign(regions, "a", "paris")
    with pytest.raises(NotFound, match=r"no device matches 'z\*'"):
        assign(regions, "z*", "r1")
    with pytest.raises(ProcessFailed, match=r"expected 1 to 16 names, each once"):
        regions.command("devices", "assign", "a", "--parents", "r1,r1")
    drawn = regions.folder / "fleet.png"
    tree = json.loads(regions.command("devices", "--tree", "--plot", drawn, "--json", "-"))
    assert [one["name"] for one in tree["children"]] == ["r1", "r2", "b", "c"]
    assert [one["name"] for one in tree["children"][0]["children"]] == ["a"]
    assert drawn.stat().st_size > 1000


def test_certificates_are_renewed_below_a_region(builtin_fleet, tmp_path):
    fleet = builtin_fleet
    fleet.start_region("r1")
    fleet.start_region("r2", parent="r1")
    home = enroll(fleet, "a", "r2")
    before = (home / "cert.pem").read_bytes()
    fleet.cloud.stop()
    fleet.start_cloud("--certificate-days", "2000")  # by this, the certificate is near its end
    agent = start(fleet, "a", tmp_path)
    agent.wait_for("certificate.renewed")
    end = time.monotonic() + 60
    while (home / "cert.pem").read_bytes() == before:
        assert time.monotonic() < end
    fleet.cloud.wait_for("device.renewed device=a region=r1")
    agent.wait_for("mqtt.up", after=agent.wait_for("certificate.renewed"))
    for name, above in (("r1", "r1"), ("r2", "r1")):  # the regions' own, too: nothing below them is cut off
        region = fleet.regions[name]
        region.wait_for("uplink.up", after=region.wait_for("certificate.renewed"))
        fleet.cloud.wait_for(f"device.renewed device={name} region={above}")
    result, _ = fleet.run_task("numbers", "rounds.quorum=1")
    assert result["rounds"][0]["admitted"] == 1
