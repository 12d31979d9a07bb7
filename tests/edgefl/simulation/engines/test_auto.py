"""Engines that are chosen in the run: each client once, faults contained, every change told."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.records import Partial, Update
from edgefl.simulation.engines import auto, chooser
from edgefl.simulation.engines.auto import AutoFleet, make_engine
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.fleet import PoolFleet
from edgefl.simulation.engines.stacked import Stack
from edgefl.simulation.engines.stacked_fleet import StackedFleet
from edgefl.simulation.engines.trainer import LocalTrainer
from edgefl.simulation.simulate import Watching, simulate


@pytest.fixture
def ordered(monkeypatch):
    """Trials of four clients each, and a chooser that prefers the ways in this order."""

    def prefer(*names):
        note = chooser.Chooser.note
        speeds = {name: float(10 ** (len(names) - place)) for place, name in enumerate(names)}

        def noted(self, way, *, clients, samples, seconds):
            note(self, way, clients=clients, samples=samples, seconds=samples / speeds.get(way, 1e-3))

        monkeypatch.setattr(chooser.Chooser, "note", noted)
        monkeypatch.setattr(chooser, "MEASURE_S", 0.0)
        monkeypatch.setattr(chooser, "NOT_DIVIDED", 0)
        monkeypatch.setattr(chooser, "HOPELESS", 1e9)
        monkeypatch.setattr(chooser, "WORTH", 0.0)

    return prefer


def test_every_engine_is_tried_on_clients_that_count_once(set_up, run, ordered):
    ordered("stacked", "loop")
    setup = set_up(clients=64, rounds={"count": 2})
    fleet = AutoFleet(setup, ("loop", "stacked"))
    told = []
    fleet.on_engine = lambda name, reason: told.append((name, reason))
    seen, wanted = run(setup, fleet), run(setup, LoopFleet(setup))
    assert [name for name, _ in told] == ["stacked"]
    assert told[0][1].startswith("measured on the run's own clients: stacked ")
    for one, other in zip(seen, wanted, strict=True):
        assert sorted(one.admitted) == sorted(other.admitted)
        assert (one.up_bytes, one.down_bytes) == (other.up_bytes, other.down_bytes)
        for name, array in one.parameters.items():
            np.testing.assert_allclose(array, other.parameters[name], rtol=1e-4, atol=1e-6)


def test_what_cannot_be_stacked_says_why(set_up, run):
    setup = set_up("dropout", clients=4, rounds={"count": 1})
    fleet = make_engine("auto", setup).engine
    run(setup, fleet)
    assert "not stacked: its layer '1' is dropout" in fleet.reason


def test_a_short_simulation_starts_no_processes(set_up, run, monkeypatch):
    monkeypatch.setattr(auto, "time", SimpleNamespace(perf_counter=time.process_time))  # short on a busy machine, too
    setup = set_up("dropout", clients=30, rounds={"count": 2})
    fleet = make_engine("auto", setup).engine
    run(setup, fleet)
    assert not {"pool"} & fleet._engines.keys()  # what it says of that: test_chooser.py


def test_a_round_that_needs_no_more_answers_is_measured_too(set_up):
    setup = set_up(clients=40, rounds={"count": 8, "clients": 10})
    result = simulate(setup.task, config=setup.config, population=setup.make_population)
    assert "loop " in result.engine_reason


@pytest.mark.parametrize("faster", ["pool", "loop"])
def test_the_slower_of_pool_and_loop_is_closed(set_up, run, ordered, monkeypatch, faster):
    monkeypatch.setattr(auto, "num_cores", lambda: 2)
    ordered(faster)
    setup = set_up("dropout", clients=64, rounds={"count": 3})
    fleet = AutoFleet(setup, ("loop", "pool"))
    run(setup, fleet)
    assert list(fleet._engines) == [faster]
    assert fleet.peak_rss_mb > 0
    fleet.close()


@pytest.mark.parametrize("faster", ["pool", "pool of stacks"])
def test_a_pools_workers_do_what_is_faster_there(set_up, run, ordered, faster):
    ordered(faster)
    setup = set_up(clients=64, rounds={"count": 3})
    fleet = make_engine("pool", setup).engine
    told = []
    fleet.on_engine = lambda name, reason: told.append((name, reason))
    run(setup, fleet)
    pool = fleet._engines["pool"]
    assert isinstance(pool, PoolFleet)
    assert pool._setup.method.stacks == (faster == "pool of stacks")
    fleet.close()
    assert {name for name, _ in told} == {"pool"}
    assert told[-1][1].startswith(f"measured on the run's own clients: {faster} ")


def test_a_pool_that_cannot_start_is_ruled_out(set_up, run, ordered, monkeypatch):
    monkeypatch.setattr(auto, "num_cores", lambda: 2)
    ordered("pool")
    setup = dataclasses.replace(set_up("dropout", clients=40, rounds={"count": 3}), reference=None)
    fleet = AutoFleet(setup, ("loop", "pool", "pool of stacks"))
    outcomes = run(setup, fleet)
    assert [len(one.admitted) for one in outcomes] == [40, 40, 40]
    assert "not pool or pool of stacks: task 'small' cannot be sent" in fleet.reason


def test_one_core_has_no_pool(set_up, monkeypatch):
    monkeypatch.setattr(auto, "num_cores", lambda: 1)
    fleet = AutoFleet(set_up("dropout"), ("loop", "pool", "pool of stacks"))
    assert "not pool or pool of stacks: there is only one core" in fleet.reason


def test_an_engine_that_is_asked_for_is_not_measured(set_up):
    chosen = make_engine("loop", set_up())
    assert isinstance(chosen.engine, LoopFleet)
    assert (chosen.name, chosen.reason) == ("loop", "it was asked for")
    with pytest.raises(ConfigError, match="engine 'warp' is not one of: auto, loop, stacked, pool"):
        make_engine("warp", set_up())


def test_a_cohort_with_over_selection_is_not_divided(set_up, run, monkeypatch):
    parts = []
    collect = LoopFleet.collect
    monkeypatch.setattr(
        LoopFleet, "collect", lambda fleet, plan: parts.append(len(plan.clients)) or collect(fleet, plan)
    )
    setup = set_up(clients=40, rounds={"count": 2, "clients": 20, "over_selection": 0.5})
    outcomes = run(setup, AutoFleet(setup, ("loop",)))
    assert parts == [30, 30]
    assert [len(one.admitted) for one in outcomes] == [20, 20]


class Failing:
    """A loop that answers for so many clients and then raises what no engine should."""

    def __init__(self, setup, good):
        self._loop, self._good, self.closed = LoopFleet(setup), good, False

    def collect(self, plan):
        for number, answer in enumerate(self._loop.collect(plan)):
            if number == self._good:
                raise IndexError("a fault of ours")
            yield answer

    def traffic(self):
        return self._loop.traffic()

    def close(self):
        self.closed = True


@pytest.mark.parametrize("good", [0, 3])
def test_others_train_whom_a_failed_engine_left_and_every_later_round(set_up, run, monkeypatch, good):
    setup = set_up(clients=30, rounds={"count": 2})
    engine = Failing(setup, good)
    monkeypatch.setattr(auto, "ENGINES", {**auto.ENGINES, "odd": lambda _setup: engine})
    fleet = AutoFleet(setup, ("loop", "odd"))
    monkeypatch.setattr(fleet._chooser, "next", _first_odd(fleet._chooser))
    seen, wanted = run(setup, fleet), run(setup, LoopFleet(setup))
    assert "not odd: it failed: IndexError: a fault of ours in round 1" in fleet.reason
    assert engine.closed
    assert (seen[1].up_bytes, seen[1].down_bytes) == (wanted[1].up_bytes, wanted[1].down_bytes)
    for one, other in zip(seen, wanted, strict=True):
        assert one.admitted == other.admitted
        for name, array in one.parameters.items():
            np.testing.assert_array_equal(array, other.parameters[name])


def _first_odd(chosen):
    """Choose the odd engine for whole cohorts until it is ruled out."""
    following = chosen.next
    chosen._trial = None

    def choose(num_here, num_later, **told):
        return following(num_here, num_later, **told) if chosen._ways["odd"].ruled_out else ("odd", num_here)

    return choose


def test_whoever_is_in_a_sum_is_not_trained_again(set_up, plan_of, monkeypatch):
    setup = set_up()

    class Summing(StackedFleet):
        def collect(self, plan):
            yield from super().collect(dataclasses.replace(plan, clients=plan.clients[:5]))
            raise RuntimeError

    monkeypatch.setattr(auto, "ENGINES", {**auto.ENGINES, "odd": Summing})
    fleet = AutoFleet(setup, ("loop", "odd"))
    monkeypatch.setattr(fleet._chooser, "next", _first_odd(fleet._chooser))
    plan = plan_of(setup)
    first, *others = fleet.collect(plan)
    assert isinstance(first, Partial)
    assert all(isinstance(one, Update) for one in others)
    assert sorted([*first.contributors, *(one.device for one in others)]) == list(plan.clients)


def test_a_fault_of_the_loop_itself_is_not_hidden(set_up, plan_of, monkeypatch):
    setup = set_up()
    monkeypatch.setattr(LocalTrainer, "train", lambda _trainer, _client: {}["fault"])
    with pytest.raises(KeyError):
        list(AutoFleet(setup, ("loop", "stacked")).collect(plan_of(setup)))


def test_auto_goes_on_and_says_so_where_a_stack_fails_in_a_later_round(tasks, ordered, monkeypatch):
    ordered("stacked", "loop")
    monkeypatch.setattr(auto, "num_cores", lambda: 1)
    whole, engines = Stack.summed, []

    def summed(stack, plan):
        if plan.round == 5:
            raise IndexError("a shape that nobody thought of")
        return whole(stack, plan)

    monkeypatch.setattr(Stack, "summed", summed)
    watching = Watching(on_engine=lambda name, _reason: engines.append(name))
    result = simulate(tasks("task"), clients=16, rounds=6, watching=watching)
    assert engines == ["loop", "stacked", "loop"]
    assert [one.admitted for one in result.rounds] == [16] * 6
    assert result.engine == "loop"
    assert "not stacked: it failed: IndexError: a shape that nobody thought of in round 5" in result.engine_reason
