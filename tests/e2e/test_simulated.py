"""What a simulation computes is what the deployed fleet computes, on real processes over TLS.

The digits example with its own configuration, but fewer samples, and in float64. In float32 its thousands of ReLUs and
maxima have ties that fall one way or the other with the order of a sum (threads, memory layout), and
two rounds of training make of that a difference in the third digit, on two equal devices too.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

import edgefl
from edgefl.config import load_config
from edgefl.simulation.world.names import Names
from edgefl.simulation.world.settings import SimulationConfig

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
CONFIG = DIGITS / "config.toml"  # two local epochs, shuffled
SETTINGS = ("rounds.clients=2", "train.seed=7")  # two of three: who is drawn must agree too
CLIENTS = Names(3)
ROUNDS = 2
PRECISE = """
import dataclasses

import torch

import task as digits


def double(load):
    def loaded(**options):
        pictures, labels = load(**options)
        return torch.from_numpy(pictures).double(), torch.from_numpy(labels)

    return loaded


def load_part(part, parts):
    pictures, labels = double(digits.load_part)(part=part, parts=parts)
    few = 40 + 20 * int(part)
    return pictures[:few], labels[:few]


task = dataclasses.replace(
    digits.task, model=lambda: digits.make_model().double(), train_data=load_part,
    test_data=double(digits.load_held_out),
)
"""


@pytest.fixture
def precise_digits(tmp_path):
    folder = tmp_path / "precise"
    folder.mkdir()
    shutil.copy(DIGITS / "task.py", folder)
    (folder / "precise.py").write_text(PRECISE)
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "precise:task"\n')
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("engines", [("loop", "pool"), pytest.param(("stacked", "ray"), marks=pytest.mark.soak)])
def test_engines_give_what_agents_give(embedded_fleet, precise_digits, engines):
    for part, name in enumerate(CLIENTS):
        embedded_fleet.add_agent(name, part=part, parts=len(CLIENTS))
    real, model = embedded_fleet.run_task(precise_digits, *SETTINGS, rounds=ROUNDS, config=CONFIG)
    config = load_config(SimulationConfig, CONFIG, SETTINGS)
    for engine in engines:
        result = edgefl.simulate(precise_digits, clients=len(CLIENTS), rounds=ROUNDS, engine=engine, config=config)
        for name, array in model.items():
            np.testing.assert_allclose(result.parameters[name], array, rtol=0, atol=1e-6, err_msg=engine)
        for ours, theirs in zip(result.rounds, real["rounds"], strict=True):
            assert ours.admitted == theirs["admitted"] == 2
            assert ours.metrics == pytest.approx(theirs["metrics"], abs=1e-6)
