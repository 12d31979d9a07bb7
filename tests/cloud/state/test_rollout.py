"""Rollouts: who is told what, how far each is, and that nothing goes back by accident."""

from __future__ import annotations

import threading

import pytest

from cloud.state.blobs import BlobStore
from cloud.state.enrolment import EnrolledDevice
from cloud.state.registry import Registry
from cloud.state.rollout import Rollouts, overall, select_devices
from cloud.state.store import open_database
from edgefl.errors import ConfigError, ManifestRejected, NotFound, ProtocolError
from edgefl.protocols.manifest import Desired, new_fleet_key, verify
from edgefl.protocols.messages import RolloutNote
from edgefl.testing import ManualClock

KEY = new_fleet_key()


def device(name, **tags):
    return EnrolledDevice(name=name, serial="1", tags=tags, enrolled_s=0.0)


class Fleet:
    """Rollouts over three devices, with two versions of one model; keeps what was sent."""

    def __init__(self, folder):
        self.engine, blobs = open_database(folder / "cloud.db"), BlobStore(folder / "blobs")
        self.registry = Registry(self.engine, blobs, KEY)
        for content in (b"v1", b"v2"):
            self.registry.publish("m", blobs.put(content), {})
        self.devices = [device("a", site="north"), device("b", site="south"), device("c", site="north")]
        self.sent = []
        self.rollouts = self.reopened()

    def reopened(self):
        return Rollouts(
            self.engine, self.registry, KEY,
            devices=lambda: self.devices, send_desired=lambda *one: self.sent.append(one), clock=ManualClock(7.0),
        )  # fmt: skip

    def last(self, name):
        return verify([signed for to, signed in self.sent if to == name][-1], Desired, KEY.public_key())

    def note(self, name, version, state, detail=""):
        self.rollouts.note(name, RolloutNote(model="m", version=version, state=state, detail=detail))

    def states(self, rollout):
        return {one["device"]: one["state"] for one in self.rollouts.status(rollout)["devices"]}


@pytest.fixture
def fleet(tmp_path):
    one = Fleet(tmp_path)
    yield one
    one.engine.dispose()


def test_every_device_gets_a_wish_of_its_own_signed(fleet):
    rollout = fleet.rollouts.start("m")
    assert [name for name, _ in fleet.sent] == ["a", "b", "c"]
    wish = fleet.last("b")
    assert (wish.device, wish.release, wish.sequence, wish.rollback) == ("b", fleet.registry.release("m", 2), 1, False)
    status = fleet.rollouts.status(rollout)
    assert (status["model"], status["version"], status["state"], status["created_s"]) == ("m", 2, "running", 7.0)
    assert fleet.states(rollout) == dict.fromkeys("abc", "pending")


def test_a_rollout_is_done_when_all_are_active(fleet):
    rollout = fleet.rollouts.start("m")
    for name in "abc":
        for state in ("downloading", "installed", "active"):
            assert fleet.rollouts.status(rollout)["state"] == "running"
            fleet.note(name, 2, state)
    assert fleet.rollouts.status(rollout)["state"] == "done"


def test_a_rollout_with_one_failure_has_failed_and_says_why(fleet):
    rollout = fleet.rollouts.start("m")
    fleet.note("a", 2, "active")
    fleet.note("b", 2, "failed", "SHA-256 differs")
    assert fleet.rollouts.status(rollout)["state"] == "running"
    fleet.note("c", 2, "active")
    status = fleet.rollouts.status(rollout)
    assert status["state"] == "failed"
    assert {"device": "b", "state": "failed", "detail": "SHA-256 differs"} in status["devices"]


def test_a_device_that_failed_may_still_come_through(fleet):
    rollout = fleet.rollouts.start("m", to=["name:a"])
    fleet.note("a", 2, "failed", "no room")
    fleet.note("a", 2, "downloading")
    fleet.note("a", 2, "active")
    assert fleet.rollouts.status(rollout)["devices"] == [{"device": "a", "state": "active", "detail": ""}]


def test_notes_that_come_again_or_late_change_nothing(fleet):
    rollout = fleet.rollouts.start("m", to=["name:a"])
    fleet.note("a", 2, "active")
    for state in ("downloading", "installed", "active"):
        fleet.note("a", 2, state, "again")
    fleet.note("a", 1, "failed", "of another version")
    fleet.note("stranger", 2, "active")
    assert fleet.rollouts.status(rollout)["devices"] == [{"device": "a", "state": "active", "detail": ""}]


def test_a_state_that_nobody_knows_is_refused(fleet):
    fleet.rollouts.start("m")
    with pytest.raises(ProtocolError, match="'exploded' of 'a' is not one of: pending, downloading"):
        fleet.note("a", 2, "exploded")


def test_a_long_detail_is_cut(fleet):
    rollout = fleet.rollouts.start("m", to=["name:a"])
    fleet.note("a", 2, "failed", "x" * 5000)
    assert len(fleet.rollouts.status(rollout)["devices"][0]["detail"]) == 500


def test_an_older_version_is_refused_whole(fleet):
    fleet.rollouts.start("m", 2, ["name:b"])
    sent = len(fleet.sent)
    with pytest.raises(ManifestRejected, match=r"version 1 is older than what 1 devices are to serve: b \(version 2\)"):
        fleet.rollouts.start("m", 1)
    assert len(fleet.sent) == sent
    assert fleet.rollouts.desired_for("a") == []  # not even those that it could have gone to
    assert len(fleet.rollouts.list()) == 1


def test_rollback_goes_back_and_is_signed_as_such(fleet):
    first = fleet.rollouts.start("m", 2)
    back = fleet.rollouts.start("m", 1, rollback=True)
    wish = fleet.last("a")
    assert (wish.release.version, wish.rollback, wish.sequence) == (1, True, 2)
    assert fleet.rollouts.status(first)["state"] == "superseded"
    assert fleet.states(back) == dict.fromkeys("abc", "pending")


def test_the_sequence_rises_with_every_rollout_that_touches_a_device(fleet):
    fleet.rollouts.start("m", 1)
    fleet.rollouts.start("m", 2, ["name:a"])
    fleet.rollouts.start("m", 2)
    assert [fleet.last(name).sequence for name in "abc"] == [3, 2, 2]


def test_a_rollout_again_of_what_is_served_is_done_at_once(fleet):
    for name in "abc":
        fleet.rollouts.start("m", to=[f"name:{name}"])
        fleet.note(name, 2, "active")
    again = fleet.rollouts.start("m")
    assert fleet.rollouts.status(again)["state"] == "done"


def test_after_a_restart_everything_is_as_it_was(fleet):
    rollout = fleet.rollouts.start("m")
    fleet.note("a", 2, "installed")
    again = fleet.reopened()
    assert again.status(rollout) == fleet.rollouts.status(rollout)
    assert again.desired_for("a") == [fleet.sent[0][1]]


def test_a_removed_device_is_not_waited_for_and_its_sequence_goes_on(fleet):
    rollout = fleet.rollouts.start("m", to=["name:a"])
    fleet.rollouts.forget("a")
    (member,) = fleet.rollouts.status(rollout)["devices"]
    assert (member["state"], member["detail"]) == ("failed", "the device was removed from the fleet")
    fleet.rollouts.start("m", to=["name:a"])
    assert fleet.last("a").sequence == 2


def test_a_device_of_a_removed_ones_name_inherits_neither_wish_nor_version(fleet):
    fleet.rollouts.start("m", 2, to=["name:a"])
    fleet.rollouts.forget("a")
    assert fleet.rollouts.desired_for("a") == []
    fleet.rollouts.start("m", 1, to=["name:a"])  # no step back: nothing newer was ever here
    assert fleet.rollouts.desired_for("a") == [fleet.sent[-1][1]]


def test_unknown_models_versions_and_rollouts_are_not_found(fleet):
    with pytest.raises(NotFound, match="no model 'n'"):
        fleet.rollouts.start("n")
    with pytest.raises(NotFound, match="no version 9"):
        fleet.rollouts.start("m", 9)
    with pytest.raises(NotFound, match="no rollout 'rollout-0'"):
        fleet.rollouts.status("rollout-0")


@pytest.mark.parametrize(
    ("to", "names"),
    [
        (["all"], ["a", "b", "c"]),
        (["site=north"], ["a", "c"]),
        (["site=south", "name:a"], ["a", "b"]),
        (["name:b", "name:b"], ["b"]),
    ],
)
def test_selectors(fleet, to, names):
    assert select_devices(fleet.devices, to) == names


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("name:d", "no device matches 'name:d'; enrolled devices: a, b, c"),
        ("site=x", "no device matches"),
        ("a", "expected all"),
    ],
)
def test_a_selector_that_matches_nothing_is_refused(fleet, selector, said):
    with pytest.raises(ConfigError, match=said):
        fleet.rollouts.start("m", to=["all", selector])
    assert fleet.sent == []


def test_nobody_enrolled_is_said(fleet):
    fleet.devices = []
    with pytest.raises(ConfigError, match="enrolled devices: none"):
        fleet.rollouts.start("m")


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([], "superseded"),
        (["active"], "done"),
        (["active", "failed"], "failed"),
        (["failed", "pending"], "running"),
        (["installed"], "running"),
    ],
)
def test_overall_by_hand(states, said):
    assert overall(states) == said


def test_wait_hears_of_a_change_and_ends_at_its_deadline(fleet):
    seen = fleet.rollouts.wait(-1, 0)
    assert fleet.rollouts.wait(seen, 0.01) == seen
    fleet.rollouts.start("m")
    seen = fleet.rollouts.wait(seen, 0.01)
    teller = threading.Timer(0.02, fleet.note, ("a", 2, "active"))
    teller.start()
    assert fleet.rollouts.wait(seen, 5) == seen + 1
    teller.join()


def test_a_note_that_changes_nothing_wakes_nobody(fleet):
    fleet.rollouts.start("m")
    seen = fleet.rollouts.wait(-1, 0)
    fleet.note("a", 1, "active")
    assert fleet.rollouts.wait(seen, 0.01) == seen
