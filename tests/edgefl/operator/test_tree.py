"""The fleet as a tree, from the cloud's lists."""

from __future__ import annotations

from edgefl.operator.tree import bytes_text, fleet_tree, job_notes, tree_lines

BYTES = {"devices_up_bytes": 2_500_000, "devices_down_bytes": 900, "parent_up_bytes": 1000, "parent_down_bytes": 0}


def region(name, parent="cloud", *, online=True):
    return {"name": name, "parent": parent, "online": online, "state": {"version": "1", **BYTES} if online else None}


def device(name, parents=("cloud",), via="", *, online=True):
    return {"name": name, "online": online, "via": via, "parents": list(parents)}


def tree():
    regions = [region("norway"), region("oslo", "norway"), region("rome", online=False)]
    devices = [
        device("cam-1", ["oslo", "norway"], via="norway"),  # the cloud sees the region that is directly below it
        device("cam-2", ["rome", "cloud"]),
        device("cam-3", ["rome"], online=False),
        device("cam-4"),
    ]
    return fleet_tree(regions, devices)


def test_devices_stand_where_they_are_connected_others_at_their_first_parent():
    assert list(tree_lines(tree())) == [
        "cloud  3 of 4 devices online",
        "|-- norway  online  devices 900 B down 2.5 MB up, parent 0 B down 1.0 kB up  1 of 1 devices online",
        "|   `-- oslo  online  devices 900 B down 2.5 MB up, parent 0 B down 1.0 kB up  1 of 1 devices online",
        "|       `-- cam-1  online  parents oslo,norway",
        "|-- rome  not connected  0 of 1 devices online",
        "|   `-- cam-3  offline",
        "|-- cam-2  online  parents rome,cloud",
        "`-- cam-4  online",
    ]


def test_the_json_is_the_tree():
    [norway, rome, _, cam_4] = tree().as_json()["children"]
    assert (norway["kind"], norway["online"], norway["devices_up_bytes"]) == ("region", True, 2_500_000)
    assert norway["children"][0]["children"][0]["via"] == "oslo"
    assert (rome["online"], rome["children"][0]["via"]) == (False, "")
    assert cam_4 == {"name": "cam-4", "kind": "device", "online": True, "via": "cloud", "parents": ["cloud"]}


def test_a_job_says_what_was_refused_where():
    job = {"rounds": [{"reasons": {"cam-1": "r"}}, {"reasons": {"cam-1": "s", "cam-4": "t", "gone": "u"}}]}
    assert job_notes(tree(), job) == {
        "cam-1": "2 refused or failed", "oslo": "2 refused or failed", "norway": "2 refused or failed",
        "cam-4": "1 refused or failed", "cloud": "3 refused or failed",
    }  # fmt: skip


def test_a_device_of_a_removed_region_stands_below_the_cloud():
    assert [one.name for one in fleet_tree([], [device("cam-1", ["gone"], via="gone")]).children] == ["cam-1"]


def test_bytes_for_people():
    assert [bytes_text(count) for count in (0, 999, 1000, 3_210_000_000)] == ["0 B", "999 B", "1.0 kB", "3.2 GB"]
