"""The fleet as a tree, from the cloud's lists."""

from __future__ import annotations

from edgefl.operator.tree import add_job, bytes_text, fleet_tree, tree_lines

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


def part(admitted, seconds=2.0, up=1000, down=500, **failures):
    return {"parent": "cloud", "admitted": admitted, "failures": failures, "seconds": seconds, "up_bytes": up,
            "down_bytes": down}  # fmt: skip


JOB = {
    "rounds": [
        {
            "reasons": {"cam-1": "r"},
            "regions": {"cloud": part(["cam-4"], 5.0), "norway": part([], 3.0), "oslo": part([])},
        },
        {"reasons": {"cam-4": "t", "gone": "u"}, "regions": {"cloud": part([], 7.0), "oslo": part(["cam-1"], 4.0)}},
        {"reasons": {"cam-1": "s"}},  # of a round without sums
    ]
}


def test_a_job_says_who_took_part_where_and_what_it_took():
    root = tree()
    add_job(root, JOB)
    assert [line.partition("  job: ")[2] for line in tree_lines(root)] == [
        "2 admitted, 3 refused or failed, 6 s a round, 1.0 kB down 2.0 kB up",
        "1 admitted, 2 refused or failed, 3 s a round, 500 B down 1.0 kB up",
        "1 admitted, 2 refused or failed, 3 s a round, 1.0 kB down 2.0 kB up",
        "1 admitted, 2 refused or failed: s",
        "",
        "",
        "",
        "1 admitted, 1 refused or failed: t",
    ]
    said = root.as_json()
    assert said["job"] == {
        "admitted": 2, "failed": 3, "rounds": 2, "seconds": 12.0, "up_bytes": 2000, "down_bytes": 1000,
    }  # fmt: skip
    assert said["children"][3]["job"] == {"admitted": 1, "failed": 1, "reason": "t"}
    assert "job" not in said["children"][1]


def test_a_job_without_rounds_adds_nothing():
    root = tree()
    add_job(root, {"rounds": []})
    assert list(tree_lines(root)) == list(tree_lines(tree()))


def test_a_device_of_a_removed_region_stands_below_the_cloud():
    assert [one.name for one in fleet_tree([], [device("cam-1", ["gone"], via="gone")]).children] == ["cam-1"]


def test_bytes_for_people():
    assert [bytes_text(count) for count in (0, 999, 1000, 3_210_000_000)] == ["0 B", "999 B", "1.0 kB", "3.2 GB"]
