"""`[population]` beside a job's sections, and when time is virtual."""

import pytest

from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.world.settings import EngineConfig, SimulationConfig, virtual_time, with_arguments


def test_what_is_said_besides_goes_over_the_configuration():
    config = from_dict(SimulationConfig, {"population": {"clients": 5, "partitioner": "iid", "data": {"a": "1"}}})
    over = with_arguments(config, clients=7, rounds=3, data={"b": "2"})
    assert (over.population.clients, over.population.partitioner) == (7, "iid")
    assert (dict(over.population.data), over.rounds.count) == ({"a": "1", "b": "2"}, 3)
    assert with_arguments(config, clients=None, rounds=None, data=None) == config
    assert with_arguments(JobConfig(), clients=2, rounds=None, data=None).population.clients == 2


def test_devices_bring_virtual_time(set_up, run):
    setup, plain = set_up(rounds={"count": 1}), SimulationConfig()
    engine = LoopFleet(setup)
    assert virtual_time(setup, plain, engine) is None
    devices = {
        "speed": {"mean": 10.0},
        "downlink_mbps": {"mean": 1000.0},
        "uplink_mbps": {"mean": 1000.0},
        "rtt_s": {"mean": 0.0},
    }
    config = from_dict(SimulationConfig, {"population": {"devices": devices}})
    virtual = virtual_time(setup, config, engine)
    assert virtual is not None
    (outcome,) = run(setup, virtual.fleet)
    assert len(outcome.admitted) == 8
    assert 3.2 <= virtual.clock() < 3.3  # 16 samples, twice, at 10 a second


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"engine.compile=true needs a C\+\+ compiler"):
        EngineConfig(compile=True)


def test_what_is_not_recorded_cannot_be_compiled():
    with pytest.raises(ConfigError, match=r"engine.record=false switches off"):
        EngineConfig(compile=True, record=False)
