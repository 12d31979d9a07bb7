"""Several rounds in a region for one of its parent: kills between them, late comers, and what is left behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from edgefl.protocols.messages import Evaluate, Fit
from edgefl.protocols.tiers import Work
from edgefl.trees import SpooledTree
from tests.cloud.region.server.test_work import RegionSide, until, value_of


class Regional(RegionSide):
    """A region with two rounds for each of its parent's."""

    def ask(self, *devices):
        opened = self.plane.rounds.get(self.plane.job, 1)
        self.work.take(
            self.plane.job, 1,
            Work(fit=opened.assignment, devices=sorted(devices), offline_grace_s=0.2, region_rounds=2),
        )  # fmt: skip

    def at(self, number):
        """Wait for one of its rounds; return the first number of its model."""
        self.number = number
        opened = until(lambda: self.rounds.get(self.plane.job, number))
        return float(SpooledTree(self.blobs.path(opened.assignment.model.sha256))["w"][1])

    def first_round(self):
        """Both devices answer the first of its rounds, and the second one is open."""
        self.ask("a", "b")
        self.at(1)
        for device in ("a", "b"):
            self.answer(device, 2.0, 1.0)
        self.at(2)

    def restart(self):
        """A kill, and the next process."""
        self.stop()
        self.start()


@pytest.fixture
def r1(tiers):
    one = Regional(tiers, "r1", "a", "b")
    yield one
    one.stop()


def test_a_killed_region_goes_on_with_the_regional_round_in_which_it_was(tiers, r1):
    """What its devices have sent for it began with its model; from another subset of devices it would be another."""
    opened = tiers.open()
    r1.link.gone, r1.link.here = {"b"}, {"a"}
    r1.ask("a", "b")
    assert r1.at(1) == 1.0
    r1.answer("a", 2.0, 1.0)
    assert r1.at(2) == 3.0
    r1.answer("a", 4.0, 1.0)
    until(lambda: opened.waiting() == {"b", "c", "d", "e"})
    assert value_of(tiers, "a") == 6.0  # 2, and then 4
    r1.restart()
    r1.link.gone, r1.link.here = set(), {"a", "b"}
    r1.ask("b")  # it is back: it begins where the others were
    assert r1.at(2) == 3.0
    assert r1.rounds.get(tiers.job, 1) is None
    r1.answer("b", 8.0, 3.0)
    until(lambda: opened.waiting() == {"c", "d", "e"})
    assert value_of(tiers, "b") == 10.0
    until(lambda: r1.sent == [(["a", "b"], 4), (["b"], 1)])


def test_a_regional_round_of_an_older_round_or_an_ended_job_is_forgotten(tiers, r1):
    tiers.open()
    r1.first_round()
    model = r1.blobs.path(r1.rounds.get(tiers.job, 2).assignment.model.sha256)
    assert (len(list(r1.work._notes.noted())), model.exists()) == (1, True)
    r1.restart()
    assert (len(list(r1.work._notes.noted())), model.exists()) == (1, True)
    r1.work.keep_only([tiers.job])
    assert len(list(r1.work._notes.noted())) == 1
    r1.work.keep_only([])
    assert (list((r1.folder / "sums").iterdir()), model.exists()) == ([], False)


def test_nothing_is_left_of_a_round_whose_region_was_killed_between_two_of_its_rounds(tiers, r1):
    """Its answers of the first regional round would stay, and be taken for those of a later evaluation."""
    opened = tiers.open()
    r1.first_round()
    r1.restart()
    r1.ask("a", "b")
    r1.at(2)
    for device in ("a", "b"):
        r1.answer(device, 4.0, 1.0)
    until(lambda: opened.waiting() == {"c", "d", "e"})
    r1.work.take(tiers.job, 1, None)
    until(lambda: not r1.work._rounds)
    assert [r1.jobs.open_round(tiers.job, number, ()) for number in (1, 2)] == [[], []]
    assert [one for one in (r1.folder / "spool").rglob("*") if one.is_file() and ".free" not in one.parts] == []
    assert list((r1.folder / "sums").iterdir()) == []
    assert [one for one in r1.blobs.folder.iterdir() if one.is_file()] == []


def test_a_round_that_ended_while_its_region_was_down_leaves_nothing(tiers, r1):
    tiers.open()
    r1.first_round()
    r1.restart()
    tiers.rounds.remove(tiers.rounds.get(tiers.job, 1))
    later = tiers.open(number=2)
    work = Work(fit=later.assignment, devices=["a"], offline_grace_s=5.0, region_rounds=2)
    r1.work.take(tiers.job, 2, work)
    until(lambda: r1.rounds.get(tiers.job, 3))
    assert [r1.jobs.open_round(tiers.job, number, ()) for number in (1, 2)] == [[], []]
    assert not [one for one in (r1.folder / "spool").rglob("a") if one.is_file()]


def test_a_round_that_is_closed_between_two_of_its_rounds_asks_nobody_any_more(tiers, r1):
    tiers.open()
    noting, go_on = threading.Event(), threading.Event()
    real = r1.work._notes.put

    def put(*note):
        noting.set()
        assert go_on.wait(30)
        real(*note)

    r1.work._notes.put = put
    r1.ask("a", "b")
    r1.at(1)
    for device in ("a", "b"):
        r1.answer(device, 2.0, 1.0)
    assert noting.wait(30)
    r1.work.take(tiers.job, 1, None)
    r1.link.told.clear()
    go_on.set()
    until(lambda: not r1.work._rounds)
    assert not [one for _, one in r1.link.told if isinstance(one, Fit)]
    assert r1.rounds.get(tiers.job, 2) is None


def test_a_killed_region_whose_devices_are_away_sends_what_it_has(tiers, r1):
    opened = tiers.open()
    r1.first_round()
    r1.answer("a", 4.0, 1.0)
    r1.restart()
    r1.ask()
    until(lambda: "a" not in opened.waiting())
    assert value_of(tiers, "a") == 6.0


def test_a_note_of_another_model_of_the_parent_is_forgotten(tiers, r1):
    """A cloud that was restored from a backup asks again, from another model."""
    opened = tiers.open()
    r1.first_round()
    r1.restart()
    tiers.rounds.remove(opened)
    other = tiers.blobs.put_tree({"w": tiers.parameters["w"] + np.float32(1), "n": tiers.parameters["n"]})
    tiers.open(model=other)
    r1.ask("a", "b")
    assert r1.at(1) == 2.0
    assert r1.opened("a").waiting() == {"a", "b"}


def test_an_evaluation_has_a_number_of_its_own(tiers, r1):
    """Round 2 of the cloud is no regional round 2 of the round before."""
    opened = tiers.open(number=2)
    fit = opened.assignment
    asked = Evaluate(
        job=tiers.job, round=2, model=fit.model, model_blake3="00", bundle=fit.bundle, seed=1, workers=0,
        deadline_s=60.0, max_update_bytes=1000,
    )  # fmt: skip
    r1.work.take(
        tiers.job, 2, Work(evaluate=asked, devices=["a"], offline_grace_s=5.0, region_rounds=2)
    )  # fmt: skip
    here = until(lambda: r1.rounds.get(tiers.job, 3))
    assert here.assignment.kind == "evaluate"
    assert here.waits_for("a")
