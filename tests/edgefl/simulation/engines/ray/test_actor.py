"""What an actor does, asked in this process: loads a task that came to it, and answers for its chunks."""

import dataclasses
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.process.workers.messages import Ready
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.messages import BeginRound, Chunk, Flush
from edgefl.simulation.engines.ray.actor import Actor, start_of


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(Path.cwd())  # an actor goes elsewhere


@pytest.mark.parametrize("here", [True, False])
def test_an_actor_trains_as_the_loop_does(set_up, plan_of, here, tmp_path):
    setup = set_up()
    plan = plan_of(setup)
    start = start_of(setup, here=here)
    assert (start.bundle is None) is here
    actor = Actor(start)
    assert actor.ready() == Ready()
    actor.begin(BeginRound(dataclasses.replace(plan, parameters={}), sums=True), plan.parameters)
    actor.answer(Chunk(plan.clients))
    partial = actor.answer(Flush()).answer.partial
    singles = list(LoopFleet(setup).collect(plan))
    assert partial.contributors == plan.clients
    for name, total in partial.total.items():
        np.testing.assert_allclose(total, sum(one.weight * one.tree[name] for one in singles), atol=1e-12)
    assert len(list(tmp_path.glob("edgefl-task-*"))) == (not here)
    Actor(start).ready()  # one that will be killed
    actor.leave()
    assert not list(tmp_path.glob("edgefl-task-*"))


def test_a_task_object_travels_where_its_parts_have_names(set_up):
    setup = dataclasses.replace(set_up(), reference=None)
    actor = Actor(start_of(setup, here=False))
    assert actor.ready() == Ready()
    with pytest.raises(ConfigError, match="cannot be sent to worker processes"):
        start_of(dataclasses.replace(set_up("dropout"), reference=None), here=False)


def test_a_population_without_a_name_is_refused(set_up):
    setup = dataclasses.replace(set_up(), make_population=lambda _task: None)
    with pytest.raises(ConfigError, match="population cannot be sent to the cluster"):
        start_of(setup, here=True)


def test_a_task_that_is_too_large_to_travel_says_so(set_up, monkeypatch):
    monkeypatch.setattr("edgefl.bundle.MAX_BUNDLE_BYTES", 10)
    with pytest.raises(ConfigError, match=r"cannot be sent to the cluster: .*Keep data outside the folder"):
        start_of(set_up(), here=False)


def test_what_is_missing_there_is_its_answer(set_up):
    start = start_of(set_up(), here=True)
    assert "no module 'no'" in Actor(dataclasses.replace(start, reference="no.such:task")).ready().fault
    missing = pickle.dumps(os.getcwd).replace(b"posix", b"poxis")
    assert "No module named 'poxis'" in Actor(dataclasses.replace(start, make_population=missing)).ready().fault
