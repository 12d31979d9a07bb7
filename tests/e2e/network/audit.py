"""The model of an undisturbed run of `tasks/audited`, computed in one process, and how a real one differs from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edgefl.trees import SpooledTree
from tests.e2e.tasks.audited.audited_task import DEVICES, answer, initial, weight

TOLERANCE = 1e-6


def undisturbed(rounds):
    """Return the parameters after these rounds, in which each device was counted once, and `train_who` of each."""
    parameters, who = initial(), []
    for number in range(1, rounds + 1):
        weights = [weight(device, number) for device in range(DEVICES)]
        answers = [answer(device, number, parameters) for device in range(DEVICES)]
        parameters = {
            name: (value + sum(
                part * one[name].astype(np.float64) for part, one in zip(weights, answers, strict=True)
            ) / sum(weights)).astype(value.dtype)
            for name, value in parameters.items()
        }  # fmt: skip
        who.append(sum(part * 2.0**device for device, part in enumerate(weights)) / sum(weights))
    return parameters, who


def faults_of(result: Path, model: Path, rounds: int) -> list[str]:
    """Return how the fleet's own record of a job, and its model, differ from the undisturbed run."""
    told, found = json.loads(result.read_text())["rounds"], SpooledTree(model)
    expected, who = undisturbed(rounds)
    faults = [] if [one["round"] for one in told] == list(range(1, rounds + 1)) else [f"it has {len(told)} rounds"]
    for one, metric in zip(told, who, strict=False):
        counts = {name: one[name] for name in ("admitted", "rejected", "failed", "missing")}
        if counts != {"admitted": DEVICES, "rejected": 0, "failed": 0, "missing": 0}:
            faults.append(f"round {one['round']}: {counts} {one['reasons']}")
        if abs(one["metrics"]["train_who"] - metric) > TOLERANCE:
            faults.append(f"round {one['round']}: others were counted, train_who {one['metrics']['train_who']}")
    for name, value in expected.items():
        if not np.allclose(found[name], value, rtol=TOLERANCE, atol=TOLERANCE):
            faults.append(f"tensor {name} is {found[name]}, undisturbed it is {value}")
    return faults
