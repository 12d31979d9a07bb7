"""What a region does for its parent, with a real parent over TLS: folded, folded again, at any depth, after a kill."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest

from cloud.dataplane.grpc_fleet import FleetDependencies
from cloud.dataplane.open_rounds import OpenRounds
from cloud.jobs.answers import AnswerRow
from cloud.region.server.work import RegionWork
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.spool import Spool
from cloud.state.store import open_database
from edgefl.config import TrainConfig
from edgefl.errors import CloudStopping
from edgefl.protocols.messages import Fit
from edgefl.protocols.tiers import SumNote, Work, pack
from edgefl.trees import SpooledTree, write_tree
from tests.cloud.dataplane.rounds import FakeLink
from tests.cloud.region.conftest import WAIT_S


def until(predicate):
    end_s = time.monotonic() + WAIT_S
    while not (found := predicate()):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    return found


class RegionSide:
    """A region's own parts: its database, spool and rounds; its devices answer as the test says."""

    def __init__(self, plane, name, *here):
        self.plane, self.name = plane, name
        self.folder = plane.folder / f"home-{name}"
        self.folder.mkdir(exist_ok=True)
        self.uplink = plane.uplink(name)
        self.link = FakeLink()
        self.link.here = set(here)
        self.number = 1  # of the round
        self.start()

    def start(self):
        self.engine = open_database(self.folder / "region.db")
        self.blobs, self.spool = BlobStore(self.folder / "blobs"), Spool(self.folder / "spool")
        self.rounds, self.jobs = OpenRounds(), Jobs(self.engine, self.blobs, lambda _bundle: None)
        deps = FleetDependencies(self.rounds, self.jobs, self.blobs, self.spool, self.link)
        self.work = RegionWork(deps, self.folder / "sums", self.fetch, self.send)
        self.crashes = []
        self.work.on_crash = self.crashes.append
        self.sent = []

    def fetch(self, sha256):
        shutil.copy(self.plane.blobs.path(sha256), self.blobs.path(sha256))

    def send(self, one):
        state = self.plane.thread.run(self.uplink.send(one))
        self.sent.append((sorted(one.note.weights), state.status))
        return state

    def ask(self, *devices, deadline_s=60.0):
        opened = self.plane.rounds.get(self.plane.job, self.number)
        self.assignment = opened.assignment
        self.work.take(
            self.plane.job, self.number, Work(fit=opened.assignment, devices=sorted(devices), offline_grace_s=5.0)
        )

    def opened(self, device):
        def waiting():
            one = self.rounds.get(self.plane.job, self.number)
            return one if one is not None and one.waits_for(device) else None

        return until(waiting)

    def spooled(self, name, value):
        file = self.spool.file(self.plane.job, self.number, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def answer(self, device, value, weight, tensors=("w", "n")):
        """A device's update has arrived."""
        opened, file = self.opened(device), self.spooled(device, value)
        with file.open("wb") as out:
            tree = {"w": np.full(500_000, value, np.float32), "n": np.array(1, np.int64)}
            write_tree({name: tree[name] for name in tensors}, out)
        row = AnswerRow(device=device, file=f"{self.plane.job}/{self.number}/{device}", weight=weight)
        assert opened.accept(row, lambda one: self.jobs.record(self.plane.job, self.number, one))

    def answer_sum(self, region, number, value, weights):
        """The sum of a region below has arrived."""
        opened, name = self.opened(min(weights)), f"{region}+{number}"
        file = self.spooled(name, value)
        with file.open("wb") as out:
            write_tree({"w": np.full(500_000, value, np.float32), "n": np.array(1.0)}, out)
        path, note = f"{self.plane.job}/{self.number}/{name}", SumNote(weights=weights)
        rows = [AnswerRow(device=one, file=path, weight=weight, region=region) for one, weight in weights.items()]
        keep = lambda some: self.jobs.record_sum(self.plane.job, self.number, path, pack(note).decode(), some)  # noqa: E731
        assert opened.accept_all(rows, keep) == []

    def stop(self):
        """End as a kill does: nothing is cleaned up."""
        self.rounds.interrupt(CloudStopping("killed"))
        self.work.close()
        self.engine.dispose()
        assert self.crashes == []


@pytest.fixture
def region(tiers):
    made = []

    def make(name, *here):
        made.append(RegionSide(tiers, name, *here))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def value_of(tiers, file_of):
    """Return the mean of the sum in which a device is, and its weights."""
    row = next(one for one in tiers.jobs.open_round(tiers.job, 1, ()) if one.device == file_of)
    return float(SpooledTree(tiers.spool.path(row.file))["w"][0])


def test_updates_become_one_sum(tiers, region):
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a", "b")
    r1.answer("a", 2.0, 1.0)
    r1.answer("b", 6.0, 3.0)
    until(lambda: opened.waiting() == {"c", "d", "e"})
    assert value_of(tiers, "a") == 5.0
    assert {device for device, message in r1.link.told if isinstance(message, Fit)} == {"a", "b"}
    assert sorted(r1.link.withdrawn) == [("a", 1), ("b", 1)]  # no region below this one is to wait for them
    r1.work.take(tiers.job, 1, None)
    until(lambda: not r1.spool.path(tiers.job).joinpath("1").exists())
    assert r1.jobs.open_round(tiers.job, 1, ()) == []
    assert not r1.blobs.has(opened.assignment.model.sha256)


def test_a_sum_has_the_rounds_fragment_alone_and_its_devices_are_told_of_the_part_that_they_lack(tiers, region):
    """Of two fragments, w is the first, and n the second: round 3 sends w, and devices lack n."""
    part, r1 = tiers.blobs.put_tree({"n": tiers.parameters["n"]}), region("r1", "a", "b")
    train = TrainConfig(round=3, fragments=2)
    opened, r1.number = tiers.open(number=3, train=train, fragment=part, fragment_blake3="11"), 3
    r1.ask("a", "b")
    r1.fetch(part.sha256)  # as for a device that asks for it
    r1.answer("a", 2.0, 1.0, tensors=["w"])
    r1.answer("b", 6.0, 3.0, tensors=["w"])
    until(lambda: opened.waiting() == {"c", "d", "e"})
    row = next(one for one in tiers.jobs.open_round(tiers.job, 3, ()) if one.device == "a")
    mean = SpooledTree(tiers.spool.path(row.file))
    assert (set(mean), float(mean["w"][0]), mean["w"].dtype) == ({"w"}, 5.0, np.float32)
    assert {message.fragment for _device, message in r1.link.told if isinstance(message, Fit)} == {part}
    r1.work.take(tiers.job, 3, None)
    until(lambda: not r1.blobs.has(part.sha256))
    assert not r1.blobs.has(opened.assignment.model.sha256)


def test_an_update_of_another_fragment_is_refused_by_the_region(tiers, region):
    opened, r1 = tiers.open(number=2, train=TrainConfig(round=2, fragments=2)), region("r1", "a", "b")
    r1.number = 2
    r1.ask("a", "b")
    r1.answer("a", 2.0, 1.0, tensors=["w"])  # of round 1
    r1.answer("b", 6.0, 3.0, tensors=["n"])
    until(lambda: opened.waiting() == {"c", "d", "e"})
    rows = {one.device: one for one in tiers.jobs.open_round(tiers.job, 2, ())}
    assert "tensors missing: n" in rows["a"].reason
    assert set(SpooledTree(tiers.spool.path(rows["b"].file))) == {"n"}


def test_a_device_that_joins_after_the_sum_is_in_a_further_one(tiers, region):
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a")
    r1.answer("a", 2.0, 1.0)
    until(lambda: "a" not in opened.waiting())
    r1.ask("b")
    r1.answer("b", 6.0, 3.0)
    until(lambda: "b" not in opened.waiting())
    assert (value_of(tiers, "a"), value_of(tiers, "b")) == (2.0, 6.0)


def test_a_device_that_moves_away_is_not_waited_for(tiers, region):
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a", "b")
    r1.answer("a", 2.0, 1.0)
    r1.ask("a")  # b is elsewhere
    until(lambda: "a" not in opened.waiting())
    until(lambda: r1.sent == [(["a"], 1)])
    assert "b" in opened.waiting()


def test_a_device_that_is_away_for_a_moment_is_in_the_same_sum(tiers, region):
    """The parent's wish lacks it while the parent starts again; what it sends then is not taken, and not lost."""
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a", "b")
    own = r1.opened("b")
    r1.ask("a")
    assert (own.waiting(), own.has_answered("b")) == ({"a"}, False)
    r1.ask("a", "b")
    assert own.waiting() == {"a", "b"}
    r1.answer("b", 6.0, 3.0)
    r1.answer("a", 2.0, 1.0)
    until(lambda: not {"a", "b"} & opened.waiting())
    until(lambda: [one for one, _ in r1.sent] == [["a", "b"]])


def test_a_device_that_is_counted_elsewhere_is_left_out(tiers, region):
    tiers.members.assign("b", ["r1", "r2"])
    opened, r1, other = tiers.open(), region("r1", "a", "b"), tiers.uplink("r2")
    r1.ask("a", "b")
    assert tiers.send(other, SumNote(weights={"b": 9.0}), name="other").status == 1
    r1.answer("a", 2.0, 1.0)
    r1.answer("b", 6.0, 3.0)
    until(lambda: opened.waiting() == {"c", "d", "e"})
    assert value_of(tiers, "a") == 2.0
    until(lambda: r1.sent == [(["a", "b"], 4), (["a"], 1)])


def test_inside_the_sum_of_a_region_below_it_is_left_out_and_nobody_else_is_lost(tiers, region):
    """The others go up at once; the region below is asked for a sum without the device."""
    tiers.enroll("x", parent="r2a")
    tiers.members.assign("d", ["r1", "r2a"])
    tiers.members.note_change()
    opened, first = tiers.open(cohort=("a", "c", "d", "x")), tiers.uplink("r1")
    r2 = region("r2", "c", "d", "x")
    r2.ask("c", "d", "x")
    assert tiers.send(first, SumNote(weights={"d": 9.0}), name="first").status == 1
    r2.answer_sum("r2a", 7, 3.0, {"d": 1.0, "x": 1.0})
    r2.answer("c", 8.0, 2.0)
    until(lambda: opened.waiting() == {"a", "x"})
    assert value_of(tiers, "c") == 8.0
    r2.link.told.clear()
    r2.answer_sum("r2a", 8, 5.0, {"x": 1.0})
    until(lambda: opened.waiting() == {"a"})
    assert value_of(tiers, "x") == 5.0
    until(lambda: r2.sent == [(["c", "d", "x"], 4), (["c"], 1), (["x"], 1)])


def test_a_region_that_sent_a_sum_and_is_asked_again_folds_from_its_spool(tiers, region):
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a", "b")
    r1.answer("a", 2.0, 1.0)
    r1.answer("b", 6.0, 3.0)
    until(lambda: "a" not in opened.waiting())
    # As a parent does that gave the sum up, because b is counted elsewhere.
    assert sorted(tiers.jobs.withdraw_sums(tiers.job, 1, {"b"})) == ["a", "b"]
    tiers.rounds.remove(opened)
    again = tiers.open(cohort=("a", "c"))
    r1.ask("a")
    until(lambda: again.waiting() == {"c"})
    assert value_of(tiers, "a") == 2.0


def test_a_region_that_is_killed_sends_what_it_has(tiers, region):
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a", "b")
    r1.answer("a", 2.0, 1.0)
    r1.stop()
    r1.start()
    r1.link.here = {"b"}  # a is away now
    r1.ask("b")
    r1.answer("b", 6.0, 3.0)
    until(lambda: opened.waiting() == {"c", "d", "e"})
    assert value_of(tiers, "a") == 5.0
    r1.stop()
    r1.start()
    r1.ask()  # killed before it knew of the acknowledgement: the parent says what it has
    until(lambda: r1.sent == [(["a", "b"], 4)])
    assert len(tiers.jobs.open_round(tiers.job, 1, ())) == 2


def test_a_round_is_over_when_the_next_one_begins_or_its_job_ends(tiers, region):
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a", "b")
    r1.answer("a", 2.0, 1.0)
    assert not r1.work.is_over(tiers.job, 1)
    tiers.rounds.remove(opened)
    later = tiers.open(number=2)
    r1.work.take(tiers.job, 2, Work(fit=later.assignment, devices=["a"], offline_grace_s=5.0))
    assert r1.work.is_over(tiers.job, 1)
    until(lambda: r1.jobs.open_round(tiers.job, 1, ()) == [])
    until(lambda: r1.rounds.get(tiers.job, 2))
    r1.work.keep_only([])
    until(lambda: r1.rounds.get(tiers.job, 2) is None)
    assert r1.sent == []


def test_a_round_that_is_asked_again_while_it_ends_begins_anew(tiers, region):
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a", "b")
    r1.opened("a")
    with r1.work._lock:  # its thread cannot end it before it is asked again
        r1.work.take(tiers.job, 1, None)
        r1.ask("a", "b")
    until(lambda: len([1 for device, message in r1.link.told if device == "a" and isinstance(message, Fit)]) == 2)
    r1.answer("a", 2.0, 1.0)
    r1.answer("b", 6.0, 3.0)
    until(lambda: opened.waiting() == {"c", "d", "e"})
    assert value_of(tiers, "a") == 5.0


def test_a_parent_that_begins_again_from_another_model_gets_new_answers(tiers, region):
    """As a region does that has lost its own notes: what was sent for its former model is no answer."""
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a", "b")
    r1.answer("a", 2.0, 1.0)
    tiers.rounds.remove(opened)
    other = tiers.blobs.put_tree({"w": tiers.parameters["w"] + 1, "n": tiers.parameters["n"]})
    again = tiers.open(model=other)
    r1.ask("a", "b")
    until(lambda: (one := r1.rounds.get(tiers.job, 1)) is not None and one.assignment.model == other)
    assert r1.opened("a").waiting() == {"a", "b"}
    assert not r1.work.is_over(tiers.job, 1)
    r1.answer("a", 4.0, 1.0)
    r1.answer("b", 4.0, 1.0)
    until(lambda: again.waiting() == {"c", "d", "e"})
    assert value_of(tiers, "a") == 4.0


def test_a_device_in_a_sum_that_was_given_up_is_folded_again_and_not_asked(tiers, region):
    """Its answer is here: sent again, the database would refuse it for ever."""
    opened, r1 = tiers.open(), region("r1", "a", "b")
    r1.ask("a")
    r1.answer("a", 2.0, 1.0)
    until(lambda: "a" not in opened.waiting())
    r1.ask("b")
    waiting = r1.opened("b")
    tiers.jobs.withdraw_sums(tiers.job, 1, {"a"})
    tiers.rounds.remove(opened)
    again = tiers.open()
    r1.ask("a", "b")
    assert waiting.waiting() == {"b"}
    r1.answer("b", 6.0, 3.0)
    until(lambda: again.waiting() == {"c", "d", "e"})
    assert (value_of(tiers, "a"), value_of(tiers, "b")) == (2.0, 6.0)
