"""edgefl: `edgefl.simulate` with one of its engines."""

from __future__ import annotations

import argparse
import dataclasses

from benchmarks.simulation_rivals.common import Finished, Work, run
from edgefl import simulate
from edgefl.config import load_config
from edgefl.simulation.world.population import PopulationConfig
from edgefl.simulation.world.settings import SimulationConfig


def contest(work: Work, given: argparse.Namespace) -> Finished:
    """Simulate; `--population N` has N clients that share all samples, instead of the workload's own partition."""
    asked = load_config(SimulationConfig, None, given.settings.split())
    plain = work.config
    config = dataclasses.replace(
        asked,
        rounds=plain.rounds,
        train=dataclasses.replace(asked.train, epochs=1, batch_size=plain.train.batch_size, lr=plain.train.lr),
        population=PopulationConfig(clients=work.workload.clients),
    )
    if given.population:
        shared = PopulationConfig(clients=given.population, partitioner="iid", samples_per_client=work.workload.samples)
        config = dataclasses.replace(config, population=shared)
    result = simulate(work.workload.reference, engine=given.engine, config=config, evaluate_every=work.rounds)
    return Finished(
        [one.seconds for one in result.rounds],
        result.final.get("accuracy"),
        {"engine": result.engine, "why": result.engine_reason},
    )


if __name__ == "__main__":
    run(contest, ("engine", str, "auto"), ("settings", str, ""), ("population", int, 0))
