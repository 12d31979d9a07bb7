"""Where an engine fails, the loop goes on: each client once, and said."""

import dataclasses

import numpy as np
import pytest

from edgefl.records import Partial, Update
from edgefl.simulation.engines import auto
from edgefl.simulation.engines.fallback import Attempt, Sheltered
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.stacked import Stack
from edgefl.simulation.engines.stacked_fleet import StackedFleet
from edgefl.simulation.engines.trainer import LocalTrainer
from edgefl.simulation.simulate import Watching, simulate


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
def test_the_loop_trains_whom_the_engine_left_and_every_later_round(set_up, run, good):
    setup, told = set_up(rounds={"count": 2}), []
    engine = Failing(setup, good)
    sheltered = Sheltered(setup, engine, "odd")
    sheltered.on_fallback = told.append
    seen, wanted = run(setup, sheltered), run(setup, LoopFleet(setup))
    assert told == ["odd until round 1: it failed: IndexError: a fault of ours"]
    assert engine.closed
    assert (seen[1].up_bytes, seen[1].down_bytes) == (wanted[1].up_bytes, wanted[1].down_bytes)
    for one, other in zip(seen, wanted, strict=True):
        assert one.admitted == other.admitted
        for name, array in one.parameters.items():
            np.testing.assert_array_equal(array, other.parameters[name])


def test_whoever_is_in_a_sum_is_not_trained_again(set_up, plan_of):
    setup = set_up()

    class Summing(StackedFleet):
        def collect(self, plan):
            yield from super().collect(dataclasses.replace(plan, clients=plan.clients[:5]))
            raise RuntimeError

    plan = plan_of(setup)
    first, *others = Sheltered(setup, Summing(setup), "stacked").collect(plan)
    assert isinstance(first, Partial)
    assert all(isinstance(one, Update) for one in others)
    assert sorted([*first.contributors, *(one.device for one in others)]) == list(plan.clients)


def test_a_fault_of_the_loop_itself_is_not_hidden(set_up, plan_of, monkeypatch):
    setup = set_up()
    monkeypatch.setattr(LocalTrainer, "train", lambda _trainer, _client: {}["fault"])
    with pytest.raises(KeyError):
        list(Sheltered(setup, LoopFleet(setup), "loop").collect(plan_of(setup)))


@pytest.mark.parametrize("raised", [KeyboardInterrupt, GeneratorExit, SystemExit])
def test_what_is_no_fault_goes_through(raised):
    with pytest.raises(raised), Attempt("odd"):
        raise raised


def test_auto_goes_on_and_says_so_where_a_stack_fails_in_a_later_round(tasks, monkeypatch):
    monkeypatch.setattr(auto, "MEASURE_S", 0.02)
    monkeypatch.setattr(auto, "_timed", lambda engine, _plan: 1e-9 if isinstance(engine, StackedFleet) else 1e9)
    whole, engines = Stack.summed, []

    def summed(stack, plan):
        if plan.round == 2:
            raise IndexError("a shape that nobody thought of")
        return whole(stack, plan)

    monkeypatch.setattr(Stack, "summed", summed)
    watching = Watching(on_engine=lambda name, _reason: engines.append(name))
    result = simulate(tasks("task"), clients=6, rounds=3, watching=watching)
    assert engines == ["stacked", "loop"]
    assert [one.admitted for one in result.rounds] == [6, 6, 6]
    assert result.engine == "loop"
    assert result.engine_reason.endswith("stacked until round 2: it failed: IndexError: a shape that nobody thought of")


@pytest.mark.parametrize("name", ["stacked", "pool"])
def test_an_engine_that_fails_while_it_is_measured_is_ruled_out(set_up, monkeypatch, name):
    def failing(engine, _plan):
        if type(engine).__name__.lower().startswith(name):
            raise IndexError("a fault of ours")
        return 1e3

    monkeypatch.setattr(auto, "_timed", failing)
    monkeypatch.setattr(auto, "num_cores", lambda: 2)
    chosen = auto.make_engine("auto", set_up(clients=4))
    chosen.engine.close()
    assert f"not {name}: it failed: IndexError: a fault of ours" in chosen.reason
    assert chosen.name != name
