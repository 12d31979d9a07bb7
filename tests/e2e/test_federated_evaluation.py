"""Federated evaluation on real processes: by hand, as in a simulation, and over kills, also after the last round."""

import time

import edgefl
from edgefl.config import JobConfig, from_dict
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.run import WatchCallbacks, submit, watch
from edgefl.simulation.world.names import Names
from edgefl.task import load_task

TASK = """
import time
from pathlib import Path

import numpy as np

from edgefl import EvalResult, FitResult, Task


def fit(parameters, config, options):
    return FitResult(tree={"w": np.ones(1, np.float32)}, weight=1.0)


def evaluate_locally(parameters, options):
    w, part = float(parameters["w"][0]), int(options["part"])
    if part == 2:
        raise ValueError("the card is missing")
    if w == 2.0 and "last" in options:
        Path(options["last"]).touch()
        time.sleep(1.5)
    return EvalResult(metrics={"gain": w + part}, weight=1 + part)


task = Task(name="gains", initial=lambda: {"w": np.zeros(1, np.float32)}, fit=fit, evaluate_locally=evaluate_locally,
            higher_is_better={"gain": True})
"""
CONFIG = from_dict(JobConfig, {"rounds": {"count": 2, "quorum": 3, "wait_s": 60.0}})


def task_folder(tmp_path):
    folder = tmp_path / "gains"
    folder.mkdir()
    (folder / "gains.py").write_text(TASK)
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "gains:task"\n')
    return folder


def test_devices_evaluate_as_simulated_ones_whatever_is_killed(embedded_fleet, tmp_path):
    fleet, folder, marks = embedded_fleet, task_folder(tmp_path), [tmp_path / f"last-{part}" for part in range(3)]
    names = list(Names(3))
    for part, name in enumerate(names):
        fleet.add_agent(name, part=part, parts=3, last=marks[part])
    with CloudClient(fleet.url, load_credentials(fleet.credentials)) as client:
        job = submit(client, str(folder), load_task(str(folder)), CONFIG)

        def disturb(outcome):
            if outcome.round == 2:  # the last model is being evaluated, or soon will be
                end_s = time.monotonic() + 120
                while not marks[0].exists():
                    assert time.monotonic() < end_s, "no device evaluates the last model"
                    time.sleep(0.05)
                fleet.cloud.kill()
                fleet.start_cloud()
                fleet.agents[names[1]].kill()
                fleet.restart_agent(names[1], part=1, parts=3, last=marks[1])

        result = watch(client, job, load_task(str(folder)), WatchCallbacks(on_round=disturb))
        shown = client.job(job)["last_evaluation"]
    # w is 0 and 1 before the rounds, 2 after them; part 0 weighs 1, part 1 weighs 2, part 2 fails
    assert [one.metrics["devices/gain"] for one in result.rounds] == [2 / 3, 5 / 3]
    assert result.final["devices/gain"] == 8 / 3
    assert result.final["devices/gain/worst_tenth"] == 2.0
    assert result.final["devices/count"] == 2.0
    for one in (*result.rounds, result.last_evaluation):
        assert list(one.not_evaluated) == [names[2]]
        assert "evaluate_locally raised ValueError: the card is missing" in one.not_evaluated[names[2]]
        assert "gains.py:17" in one.not_evaluated[names[2]]
    assert [one.admitted for one in result.rounds] == [3, 3]  # its updates count all the same
    assert shown == result.last_evaluation.as_json()
    assert fleet.agents[names[2]].log.read_text().count("evaluation.failed") == 1  # said once
    simulated = edgefl.simulate(str(folder), clients=3, engine="loop", config=CONFIG)
    for ours, theirs in zip(simulated.rounds, result.rounds, strict=True):
        assert ours.metrics == theirs.metrics
    assert simulated.final == result.final
