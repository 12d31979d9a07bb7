"""A run in which an agent is killed in its first round, compared with the same run in simulation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import edgefl
from tests.e2e.conftest import Fleet

NAMES = ("client-0", "client-1", "client-2")  # as simulated clients are called


def run_with_a_kill(
    fleet: Fleet, folder: Path, task: str, settings: Mapping[str, Any], *, rounds: int, region: str | None
) -> dict[str, Any]:
    """Run a task on three devices, below a region if it is given; kill -9 one of them when it has made an update.

    Return the run's result, after its model was found equal to the simulated one.
    """
    folder.mkdir()
    (folder / "pyproject.toml").write_text(f'[tool.edgefl]\ntask = "{folder.name}:task"\n')
    (folder / f"{folder.name}.py").write_text(task)
    if region is not None:
        fleet.start_region(region)
    data = {name: {"part": index, "parts": len(NAMES)} for index, name in enumerate(NAMES)}
    for name, options in data.items():
        fleet.enroll(name, **({} if region is None else {"region": region}))
        fleet.restart_agent(name, **options)
    given = [f"{key}={str(value).lower()}" for key, value in settings.items()]
    run = fleet.start_run(folder, *given, "rounds.clients=3", "rounds.offline_grace_s=120", rounds=rounds)
    agent = fleet.agents[NAMES[0]]
    agent.wait_for("update.made", after=agent.num_lines())
    agent.kill()
    fleet.restart_agent(NAMES[0], **data[NAMES[0]])
    result, model = fleet.finish_run(run)
    assert [one["admitted"] for one in result["rounds"]] == [3] * rounds
    simulated = edgefl.simulate(folder, clients=3, rounds=rounds, engine="loop", set=settings)
    for name, array in model.items():
        np.testing.assert_allclose(simulated.parameters[name], array, rtol=0, atol=1e-6)
    return result
