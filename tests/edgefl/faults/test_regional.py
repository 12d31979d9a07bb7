"""Regional rounds by hand: which models a region's devices may have begun with, and what the mean of two regions is."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.faults.regional import RegionalRounds

FIRST = {"w": np.array([1.0, 2.0])}


def entries(device, number, base, values, update, weight=1.0):
    """Return the log's entries of one training."""
    asked = {"device": device, "round": number, "base": base}
    return [
        {"kind": "started", **asked, "base_values": {"w": values}},
        {"kind": "trained", **asked, "weight": weight, "update": {"w": update}},
    ]


# Region one has a (weight 1) and b (weight 3): [1, 2] + ([4, 0] + 3 [0, 4]) / 4 = [2, 5]. Region two has c: [1, 4].
EARLY = [
    *entries("a", 1, "first", [1.0, 2.0], [4.0, 0.0]),
    *entries("b", 1, "first", [1.0, 2.0], [0.0, 4.0], 3.0),
    *entries("c", 1, "first", [1.0, 2.0], [0.0, 2.0]),
]
LATE = [
    *entries("a", 2, "one", [2.0, 5.0], [1.0, 0.0]),
    *entries("b", 2, "one", [2.0, 5.0], [0.0, 1.0], 3.0),
    *entries("c", 2, "two", [1.0, 4.0], [2.0, 2.0], 2.0),
]


def rounds(log, times=2, number=1):
    return RegionalRounds(log, number, times, "first", FIRST)


def test_two_regions_by_hand():
    found = rounds(EARLY + LATE)
    assert (found.wrong, found.devices, found.last) == ([], {"a", "b", "c"}, 2)
    assert found.counted == {("a", 1), ("b", 1), ("c", 1)}
    assert found.weight(["a", "c"]) == 3.0
    # a: [2, 5] + [1, 0] - [1, 2] = [2, 3]; b: [1, 4] (weight 3); c: [2, 4] (weight 2)
    (mean,) = found.means(["a", "b", "c"])
    assert mean["w"].tolist() == pytest.approx([(2 + 3 + 4) / 6, (3 + 12 + 8) / 6])


@pytest.mark.parametrize("values", [[2.0, 5.1], [np.nan, 5.0], [1.0, 2.5]])
def test_a_model_that_no_updates_explain_is_told(values):
    log = [*EARLY, *entries("a", 2, "odd", values, [1.0, 0.0])]
    found = rounds(log)
    assert found.wrong == ["regional round 2: odd is no mean of a region's updates"]
    assert "a" not in found.devices


def test_a_device_that_began_with_two_models_may_be_counted_with_either():
    found = rounds([*EARLY, *LATE, *entries("a", 2, "two", [1.0, 4.0], [9.0, 9.0])])
    assert sorted(mean["w"].tolist() for mean in found.means(["a"])) == [[2.0, 3.0], [9.0, 11.0]]


def test_a_region_that_got_no_update_keeps_its_model():
    """Three regional rounds, of which nobody ended the second one."""
    for begun in ([], LATE[:1]):
        found = rounds([*EARLY, *begun, *entries("a", 3, "one", [2.0, 5.0], [1.0, 0.0])], times=3)
        assert (found.wrong, found.devices) == ([], {"a"})


def test_a_later_round_of_the_cloud_has_its_own_numbers():
    third, fourth = entries("a", 3, "first", [1.0, 2.0], [4.0, 0.0]), entries("a", 4, "x", [5.0, 2.0], [0.0, 0.0])
    found = rounds([*EARLY, *LATE, *third, *fourth], number=2)
    assert (found.wrong, found.devices, found.counted) == ([], {"a"}, {("a", 3)})
