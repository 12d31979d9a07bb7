"""The note of what user code a process is in."""

import os

import pytest

from edgefl.errors import TaskError
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.isolation import at_work
from edgefl.simulation.isolation.at_work import AtWork, Cell, turn_of, watch
from edgefl.task import UserCode


@pytest.fixture
def cell(monkeypatch):
    cell = Cell()
    monkeypatch.setattr(at_work._Here, "cell", None)
    monkeypatch.setattr(UserCode, "on_change", None)
    yield cell
    cell.close()


def test_the_other_side_reads_what_was_noted_last_and_borders_within_borders_are_left_one_by_one(cell):
    other = Cell(os.dup(cell.descriptor))
    watch(cell, {})
    assert other.read() == AtWork()
    with UserCode("t", "local training"):
        turn_of("client-7")
        with UserCode("t", "recording a step"):
            assert other.read() == AtWork("recording a step", "client-7")
        with pytest.raises(TaskError), UserCode("t", "recording a step"):
            raise ValueError
        assert other.read() == AtWork("local training", "client-7")
    assert other.read() == AtWork("", "client-7")
    other.close()


def test_names_of_any_length_and_letters_are_cut_to_fit(cell):
    cell.client("ü" * 1000)
    cell.doing("\ud800" * 3)
    assert cell.read().client.startswith("ü" * 100)
    assert cell.read().doing == "???"


@pytest.mark.parametrize(
    ("doing", "of_a_client", "of_a_stack"),
    [
        ("train_data", True, False),
        ("reading train_data's inputs", True, False),
        ("local training", True, False),
        ("fit", True, False),
        ("test_data", False, False),
        ("reading test_data's inputs", False, False),
        ("evaluation", False, False),
        ("importing 'a'", False, False),
        ("model", False, False),
        ("stacked training", False, True),
        ("", False, False),
    ],
)
def test_whose_doing_it_is(doing, of_a_client, of_a_stack):
    assert (AtWork(doing, "c").of_a_client, AtWork(doing, "c").of_a_stack) == (of_a_client, of_a_stack)
    assert not AtWork(doing, "").of_a_client


@pytest.mark.parametrize("name", ["task", "own_fit"])
def test_whoever_is_not_to_be_tried_again_fails_by_name(set_up, plan_of, cell, name):
    setup = set_up(name)
    watch(cell, {"client-3": "it ended two processes"})
    answers = {one.device: one for one in LoopFleet(setup).collect(plan_of(setup))}
    assert answers["client-3"].reason == "it ended two processes"
    assert len([one for one in answers.values() if hasattr(one, "reason")]) == 1
    assert cell.read() == AtWork("", "client-7")  # the last whose turn it was


def test_who_is_not_watched_notes_nothing(cell):
    turn_of("client-0")
    with UserCode("t", "fit"):
        assert cell.read() == AtWork()
