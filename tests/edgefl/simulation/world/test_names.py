"""Names of a million clients, none of them held."""

from __future__ import annotations

import sys

import pytest

from edgefl.simulation.world.names import KnownNames, Names


def test_names_by_hand() -> None:
    names = Names(12)
    assert (len(names), names[0], names[-1], names[3:5]) == (12, "client-00", "client-11", ["client-03", "client-04"])
    assert list(names) == sorted(names)
    assert [names.index(name) for name in names] == list(range(12))
    assert list(Names(2, "d")) == ["d0", "d1"]
    assert list(Names(0)) == []


def test_a_million_names_cost_nothing() -> None:
    names = Names(1_000_000)
    assert names.index(names[999_999]) == 999_999
    assert "client-500000" in names
    assert sys.getsizeof(names) + sum(sys.getsizeof(value) for value in vars(names).values()) < 1000


@pytest.mark.parametrize("name", ["client-12", "client-3", "client-003", "client-0x", "client-²³", "other-01", "", 7])
def test_a_name_that_is_not_there(name: object) -> None:
    names = Names(12)
    assert name not in names
    with pytest.raises(ValueError, match=r"client-00 \.\. client-11"):
        names.index(name)


def test_no_position_beyond_the_end() -> None:
    with pytest.raises(IndexError):
        Names(3)[3]
    with pytest.raises(ValueError, match="it is empty"):
        Names(0).index("client-0")
    with pytest.raises(ValueError, match="not a client"):
        Names(3).index("client-0", 1)


def test_known_names_are_sorted_once_each() -> None:
    names = KnownNames(["bo", "al", "bo", "cy"])
    assert (list(names), len(names), names[1:], names.index("bo"), "al" in names) == (
        ["al", "bo", "cy"], 3, ["bo", "cy"], 1, True,
    )  # fmt: skip
    for absent in (("dee",), ("al", 1)):
        with pytest.raises(ValueError, match="not a client of this population of 3"):
            names.index(*absent)
