"""The engine that is chosen, and why."""

import re

import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.engines import auto
from edgefl.simulation.engines.auto import make_engine
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.fleet import PoolFleet
from edgefl.simulation.engines.stacked_fleet import StackedFleet


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(auto, "MEASURE_S", 0.02)


def test_small_dense_models_are_stacked_and_a_short_simulation_starts_no_processes(set_up, monkeypatch):
    monkeypatch.setattr(auto, "_timed", lambda engine, _plan: 1e-9 if isinstance(engine, StackedFleet) else 1e9)
    chosen = make_engine("auto", set_up(clients=64))
    assert isinstance(chosen.engine, StackedFleet)
    assert chosen.name == "stacked"
    assert "stacked" in chosen.reason
    assert "not pool: all rounds take about" in chosen.reason


def test_what_cannot_be_stacked_falls_back_and_says_why(set_up):
    chosen = make_engine("auto", set_up("dropout", clients=4, rounds={"count": 1}))
    assert isinstance(chosen.engine, LoopFleet)
    assert "not stacked: its layer '1' is dropout" in chosen.reason


@pytest.mark.parametrize("faster", ["pool", "loop"])
def test_a_long_simulation_measures_the_pool_too_and_ends_the_slower(set_up, monkeypatch, faster):
    monkeypatch.setattr(auto, "num_cores", lambda: 2)
    monkeypatch.setattr(
        auto, "_timed", lambda engine, _plan: 1 if (type(engine) is PoolFleet) == (faster == "pool") else 1e9
    )
    chosen = make_engine("auto", set_up("dropout", clients=40, rounds={"count": 100_000}))
    assert chosen.name == faster
    assert "pool " in chosen.reason
    chosen.engine.close()


@pytest.mark.parametrize("faster", ["pool", "pool of stacks"])
def test_a_pools_workers_do_what_is_faster_there(set_up, monkeypatch, faster):
    used = []
    monkeypatch.setattr(PoolFleet, "use", lambda _pool, method: used.append(method.stacks))
    monkeypatch.setattr(auto, "_timed", lambda _engine, _plan: 1 if (used == [True]) == (faster != "pool") else 2)
    chosen = make_engine("pool", set_up(clients=16))
    chosen.engine.close()
    assert used == ([True] if faster == "pool of stacks" else [True, False])
    assert re.match(rf"it was asked for; measured on \d+ clients: {faster} ", chosen.reason)


def test_a_pool_that_cannot_start_is_ruled_out(set_up, monkeypatch):
    import dataclasses

    monkeypatch.setattr(auto, "num_cores", lambda: 2)
    setup = dataclasses.replace(set_up("dropout", rounds={"count": 100_000}), reference=None)
    chosen = make_engine("auto", setup)
    assert chosen.name == "loop"
    assert "not pool: task 'small' cannot be sent" in chosen.reason


def test_one_core_has_no_pool(set_up, monkeypatch):
    monkeypatch.setattr(auto, "num_cores", lambda: 1)
    assert "not pool: there is only one core" in make_engine("auto", set_up("dropout")).reason


def test_an_engine_that_is_asked_for_is_not_measured(set_up):
    chosen = make_engine("loop", set_up())
    assert (chosen.name, chosen.reason) == ("loop", "it was asked for")
    with pytest.raises(ConfigError, match="engine 'warp' is not one of: auto, loop, stacked, pool"):
        make_engine("warp", set_up())
