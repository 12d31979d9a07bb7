"""The loop: the deployed round on one machine."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from edgefl.config import JobConfig, load_config
from edgefl.records import Update
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.world.task_population import TaskPopulation
from edgefl.task import load_task
from edgefl.testing import ScriptedFleet
from edgefl.training.local import set_threads, train_locally
from edgefl.trees import encoded_bytes

DIGITS = Path(__file__).parents[4] / "examples" / "digits"


def test_a_simulated_round_of_digits_is_the_deployed_one(run):
    task = load_task(str(DIGITS))
    config = load_config(JobConfig, DIGITS / "config.toml", ["rounds.count=1"])
    maker = partial(TaskPopulation, num_clients=3, options={"skew": "0.5"})
    setup = SimulationSetup(task=task, reference=None, make_population=maker, population=maker(task), config=config)
    (simulated,) = run(setup, LoopFleet(setup))

    def device(name):
        def answer(plan):
            options = {"part": name[-1], "parts": "3", "skew": "0.5"}
            fit = train_locally(task, plan.parameters, plan.train, options=options, round=plan.round, client=name)
            return Update(job=plan.job, round=1, device=name, tree=fit.tree, weight=fit.weight, metrics=fit.metrics)

        return answer

    threads = torch.get_num_threads()
    set_threads(1)
    (deployed,) = run(setup, ScriptedFleet({name: device(name) for name in setup.population.names()}))
    set_threads(threads)
    for name, array in deployed.parameters.items():
        np.testing.assert_allclose(simulated.parameters[name], array, rtol=0, atol=1e-6)
    assert simulated.weight == deployed.weight
    assert simulated.metrics == pytest.approx(deployed.metrics, abs=1e-6)
    assert simulated.up_bytes == simulated.down_bytes == 3 * encoded_bytes(deployed.parameters)


def test_the_lost_are_told_and_cost_no_upload(set_up, run):
    setup = set_up(data={"empty": "2", "infinite": "3"}, rounds={"count": 1})
    (outcome,) = run(setup, LoopFleet(setup))
    assert list(outcome.failed) == ["client-2"]
    assert list(outcome.rejected) == ["client-3"]
    size = encoded_bytes(outcome.parameters)
    assert (outcome.up_bytes, outcome.down_bytes) == (7 * size, 8 * size)


def test_no_client_is_handed_out_after_a_stop(set_up, plan_of):
    setup = set_up()
    answers = LoopFleet(setup).collect(plan_of(setup))
    next(answers)
    setup.stop.set()
    assert list(answers) == []


def test_the_round_ends_with_as_many_as_wanted(set_up, run):
    setup = set_up(rounds={"count": 1, "clients": 4, "over_selection": 0.5})
    (outcome,) = run(setup, LoopFleet(setup))
    assert (len(outcome.admitted), len(outcome.missing)) == (4, 2)
