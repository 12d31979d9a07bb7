"""Who belongs where: patterns, parents, and what is below a region; by an enrolment's real rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.state.enrolment import REGION, Enrolment
from cloud.state.members import Members, below, children
from cloud.state.store import open_database
from edgefl.errors import ConfigError, EnrolmentRefused, NotFound
from edgefl.protocols import tls
from edgefl.protocols.tiers import MAX_PARENTS, Member
from edgefl.protocols.tls import Identity


class FleetRows:
    def __init__(self, ca):
        self.folder = ca.folder
        self.engine = open_database(ca.folder / "cloud.db")
        self.enrolment, self.members = Enrolment(self.engine, ca.folder), Members(self.engine)

    def enroll(self, name, *, role="device", parent="cloud"):
        secret, _ = tls.parse_token(self.enrolment.new_token(role=role))
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        request = tls.new_request(Identity.in_folder(folder), name)
        return self.enrolment.enroll(secret, name, {"site": "a"}, request, role=role, parent=parent)


@pytest.fixture
def rows(fleet_ca):
    rows = FleetRows(fleet_ca)
    for name, parent in (("r1", "cloud"), ("r2", "cloud"), ("r2a", "r2")):
        rows.enroll(name, role=REGION, parent=parent)
    for name, parent in (("cam-1", "cloud"), ("cam-2", "r1"), ("door-1", "r2a")):
        rows.enroll(name, parent=parent)
    yield rows
    rows.engine.dispose()


def test_everybody_is_a_member_with_a_certificate_and_a_place(rows):
    members = rows.members.members()
    assert {name: (one.is_region, list(one.parents)) for name, one in members.items()} == {
        "r1": (True, ["cloud"]), "r2": (True, ["cloud"]), "r2a": (True, ["r2"]),
        "cam-1": (False, ["cloud"]), "cam-2": (False, ["r1"]), "door-1": (False, ["r2a"]),
    }  # fmt: skip
    assert all(len(one.serials) == 1 and one.tags == {"site": "a"} for one in members.values())
    assert [one.name for one in rows.enrolment.devices()] == ["cam-1", "cam-2", "door-1"]


def test_devices_are_assigned_by_a_pattern(rows):
    told = []
    rows.members.changed.append(lambda: told.append(rows.members.members()["cam-1"].parents))
    assert rows.members.assign("cam-*", ["r2a", "r1", "cloud"]) == ["cam-1", "cam-2"]
    assert told == [["r2a", "r1", "cloud"]]
    members = rows.members.members()
    assert {name: list(members[name].parents) for name in ("cam-1", "cam-2", "door-1")} == {
        "cam-1": ["r2a", "r1", "cloud"], "cam-2": ["r2a", "r1", "cloud"], "door-1": ["r2a"],
    }  # fmt: skip
    assert rows.enrolment.devices()[0].parents == ("r2a", "r1", "cloud")


@pytest.mark.parametrize("pattern", ["nobody", "CAM-*", "r*", ""])
def test_a_pattern_without_a_device(rows, pattern):
    """A region's name is not a device's: it has one parent, where it enrolled, so the tree has no cycle."""
    with pytest.raises(NotFound, match="no device matches"):
        rows.members.assign(pattern, ["r1"])


@pytest.mark.parametrize(
    ("parents", "match"),
    [
        (["r9"], "r9: no region of this fleet. Its regions: r1, r2, r2a"),
        (["r1", "cam-1"], "cam-1: no region"),
        ([], "expected 1 to 16 names"),
        (["r1", "r1"], "each once"),
        (["cloud", "cloud"], "each once"),
    ],
)
def test_parents_that_cannot_be_change_nothing(rows, parents, match):
    with pytest.raises(ConfigError, match=match):
        rows.members.assign("cam-1", parents)
    assert rows.members.members()["cam-1"].parents == ["cloud"]


def test_more_parents_than_a_device_may_have(rows):
    for number in range(MAX_PARENTS + 1):
        rows.enroll(f"n{number}", role=REGION)
    with pytest.raises(ConfigError, match="expected 1 to 16"):
        rows.members.assign("cam-1", [f"n{number}" for number in range(MAX_PARENTS + 1)])


def test_one_name_is_one_member(rows):
    """A region cannot take the name of a device, or of a region, nor a device that of a region."""
    for name, role in (("r1", REGION), ("cam-1", REGION), ("r1", "device")):
        with pytest.raises(EnrolmentRefused, match="is enrolled already"):
            rows.enroll(name, role=role)


def test_a_region_is_never_above_itself(rows):
    """By its own name, and by a circle: r2 is removed in the database alone, and comes back below its own child."""
    with pytest.raises(EnrolmentRefused, match=r"'r9' cannot be below 'r9': .* circle \(r9\)"):
        rows.members.check_parent("r9", "r9")
    rows.enrolment.remove("r2")
    with pytest.raises(EnrolmentRefused, match=r"'r2' cannot be below 'r2a': .* circle \(r2a -> r2\)"):
        rows.members.check_parent("r2", "r2a")
    with pytest.raises(EnrolmentRefused, match="'r2', the parent of 'r2a', is not a region of this fleet"):
        rows.members.check_parent("cam-9", "r2a")
    rows.enroll("r2", role=REGION, parent="r2a")  # as a former version allowed it
    with pytest.raises(EnrolmentRefused, match=r"circle \(r2 -> r2a -> r2\)"):
        rows.members.check_parent("cam-9", "r2")
    for name, parent in (("r9", "cloud"), ("cam-9", "r1")):
        rows.members.check_parent(name, parent)


@pytest.mark.parametrize("parent", ["nowhere", "cam-1", ""])
def test_a_parent_that_is_no_region(rows, parent):
    with pytest.raises(EnrolmentRefused, match=r"is not a region of this fleet\. Its regions: r1, r2, r2a"):
        rows.members.check_parent("new", parent)


def test_a_region_is_removed_when_nobody_depends_on_it(rows):
    with pytest.raises(ConfigError, match="'r2' cannot be removed: the regions r2a are below it"):
        rows.members.let_go("r2")
    with pytest.raises(ConfigError, match=r"'r2a' cannot be removed: it is the only parent of door-1\. Assign them"):
        rows.members.let_go("r2a")
    rows.members.assign("door-1", ["r2a", "cloud"])
    rows.members.assign("cam-1", ["r1", "r2a"])
    assert rows.members.let_go("r2a") == ["cam-1", "door-1"]
    members = rows.members.members()
    assert (members["cam-1"].parents, members["door-1"].parents) == (["r1"], ["cloud"])
    assert rows.members.let_go("cam-1") == rows.members.let_go("nobody") == []


def test_a_token_is_for_one_role(rows):
    for meant, used in ((REGION, "device"), ("device", REGION)):
        token = rows.enrolment.new_token(role=meant)
        secret, _ = tls.parse_token(token)
        request = tls.new_request(Identity.in_folder(rows.folder), "new")
        with pytest.raises(EnrolmentRefused, match=f"the token is for a {meant}, and 'new' enrols as a {used}"):
            rows.enrolment.enroll(secret, "new", {}, request, role=used)
        certificate = rows.enrolment.enroll(secret, f"new-{meant}", {}, request, role=meant)  # it is still good
        assert tls.is_region(certificate) is (meant == REGION)


def test_what_is_below(rows):
    rows.members.assign("cam-1", ["r1", "r2"])
    members = rows.members.members()
    assert sorted(below("r1", members)) == ["cam-1", "cam-2"]
    assert sorted(below("r2", members)) == ["cam-1", "door-1", "r2a"]
    assert sorted(below("r2a", members)) == ["door-1"]
    assert sorted(below("cloud", members)) == ["cam-1", "cam-2", "door-1", "r1", "r2", "r2a"]
    assert below("nobody", members) == {}
    assert (children("cloud", members), children("r2", members), children("r1", members)) == (["r1", "r2"], ["r2a"], [])


REGIONS = [f"r{number}" for number in range(6)]


@given(st.lists(st.integers(0, 5), min_size=6, max_size=6), st.lists(st.lists(st.integers(0, 6)), max_size=6))
def test_below_is_the_way_to_the_top(tree, devices):
    """By law, also for a tree with cycles, which a hostile parent might send: it ends, and paths decide."""
    members = {
        region: Member(serials=["1"], is_region=True, parents=["cloud" if up == number else REGIONS[up]])
        for number, (region, up) in enumerate(zip(REGIONS, tree, strict=True))
    }
    places = [*REGIONS, "cloud"]
    for number, chosen in enumerate(devices):
        members[f"d{number}"] = Member(serials=["1"], parents=[places[one] for one in dict.fromkeys(chosen)][:16])

    def above(region):
        seen = []
        while region != "cloud" and region not in seen:
            seen.append(region)
            [region] = members[region].parents
        return {*seen, region}

    for top in (*REGIONS, "cloud"):
        expected = {
            name
            for name, one in members.items()
            if name != top and any(top in above(parent) for parent in ([name] if one.is_region else one.parents))
        }
        assert below(top, members).keys() == expected
