"""What a simulation computes is what the deployed fleet computes, on real processes over TLS.

Digits in float32 go through thousands of ReLUs and maxima: where sums are taken in another order, one
tie that falls the other way shows in the fourth digit. So agents get one thread, as an engine's clients
have, and then not a bit differs. In float64 nothing falls the other way: there stacks are compared too.
"""

from pathlib import Path

import numpy as np
import pytest

import edgefl
from edgefl.config import load_config
from edgefl.simulation.names import Names
from edgefl.simulation.settings import SimulationConfig

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
RAGGED = Path(__file__).parent / "tasks" / "ragged"
CONFIG = DIGITS / "config.toml"  # two local epochs, shuffled
SETTINGS = ("rounds.clients=2", "train.seed=7")  # two of three: who is drawn must agree too
CLIENTS = Names(3)
ROUNDS = 2
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def test_engines_give_what_agents_give(embedded_fleet):
    for part, name in enumerate(CLIENTS):
        embedded_fleet.add_agent(name, env=ONE_THREAD, part=part, parts=len(CLIENTS))
    for task, engines in ((DIGITS, ("loop", "pool")), (RAGGED, ("loop", "stacked"))):
        real, model = embedded_fleet.run_task(task, *SETTINGS, rounds=ROUNDS, config=CONFIG)
        for engine in engines:
            config = load_config(SimulationConfig, CONFIG, SETTINGS)
            result = edgefl.simulate(task, clients=len(CLIENTS), rounds=ROUNDS, engine=engine, config=config)
            for name, array in model.items():
                np.testing.assert_allclose(result.parameters[name], array, rtol=0, atol=1e-6, err_msg=engine)
            for ours, theirs in zip(result.rounds, real["rounds"], strict=True):
                assert ours["admitted"] == theirs["admitted"] == 2
                assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-6)
