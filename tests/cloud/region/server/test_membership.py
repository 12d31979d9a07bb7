"""What a region knows of the fleet: entry by entry, kept for a start without its parent."""

from __future__ import annotations

import json

import pytest

from cloud.region.server.membership import FILE, CutOff, RegionMembership
from edgefl.errors import HomeError, ProtocolError
from edgefl.protocols.messages import Signed, encode
from edgefl.protocols.tiers import Member, pack

SIGNED = Signed(text='{"release": {"model": "m"}}', key_id="k", signature="s")


def member(*serials, **named):
    return pack(Member(**{"serials": list(serials), "parents": ["north"], **named}))


@pytest.fixture
def known(tmp_path):
    return RegionMembership(tmp_path, "north")


def test_who_may_connect(known):
    known.take("member/a", member("1", "2"))
    known.take("member/b", member("3", parents=["cloud", "north"]))
    known.take("member/below", member("4", parents=["south"]))  # below a region that is below this one
    known.take("member/south", member("5", is_region=True))
    assert [known.is_known("a", serial) for serial in ("1", "2", "3", None)] == [True, True, False, True]
    assert known.is_known("b", "3")
    assert not known.is_known("below", "4")
    assert known.is_known("south", "5")
    assert not known.is_known("stranger")
    assert [known.is_device(name) for name in ("a", "below", "south", "stranger")] == [True, True, False, False]


def test_who_is_cut_off(known):
    told = []
    known.changed.append(lambda: told.append(sorted(known.members())))
    assert known.take("member/a", member("1")) is None
    assert known.take("member/a", member("1", "2")) is None  # a renewal
    assert known.take("member/a", member("2")) is None
    assert known.take("member/a", member("9")) == CutOff("a")  # enrolled anew: not with its old certificate
    # It may not connect here any more.
    assert known.take("member/a", member("9", parents=["south"])) == CutOff(
        "a", is_moved=True
    )  # it may not connect here any more
    assert known.take("member/a", None) == CutOff("a", is_moved=True)  # elsewhere, or removed: the top knows
    assert known.take("member/a", None) is None
    assert told[0] == ["a"]
    assert told[-1] == []
    assert len(told) == 7


def test_what_is_kept_for_a_start_without_the_parent(known, tmp_path):
    known.take("member/a", member("1", tags={"site": "x"}))
    known.take("desired/a/m", encode(SIGNED))
    known.take("revoked", b"-----BEGIN X509 CRL-----\n")
    known.take("running", b'["job-1"]')
    again = RegionMembership(tmp_path, "north")
    assert again.members() == known.members()
    assert again.desired_for("a") == [SIGNED]
    assert again.desired_for("b") == []
    assert again.crl() == b"-----BEGIN X509 CRL-----\n"
    assert again.running() == ["job-1"]  # so that it does not say of a round that it is over
    again.take("desired/a/m", None)
    again.take("running", None)
    assert (again.desired_for("a"), again.running()) == ([], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("member/a", b"{}"),
        ("member/a", b"\xff"),
        ("desired/a/m", b"{}"),
        ("running", b"{"),
        ("running", b"{}"),
        ("revoked", b"\xff"),
        ("odd/a", b"x"),
        ("", b""),
    ],
)
def test_an_entry_that_cannot_be_changes_nothing(known, tmp_path, key, value):
    known.take("member/a", member("1"))
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(ProtocolError):
        known.take(key, value)
    assert known.is_known("a", "1")
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", json.dumps({"members": {"a": {}}, "desired": {}, "crl": ""})])
def test_a_damaged_file(known, tmp_path, damage):
    known.take("member/a", member("1"))
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(HomeError, match=r"fleet\.json is damaged"):
        RegionMembership(tmp_path, "north")
