"""A task whose model is its own ledger: from it, anybody can tell who was counted, with which weight and parameters.

Each device's answer follows from its number, the round and the parameters, so that an auditor computes it again.
Shapes: D = devices.
"""

from __future__ import annotations

import time

import numpy as np

from edgefl import FitResult, Task

DEVICES = 6


def initial():
    return {
        "follows": np.zeros(3, np.float32),  # depends on the parameters that each device was sent
        "shares_d": np.zeros(DEVICES, np.float64),  # the sum over the rounds of each device's share of the weights
        "drawn": np.zeros(4, np.float32),  # another for each device and round: an answer to another round would differ
        "rounds": np.array(0, np.int64),
    }


def weight(device, number):
    """Return the weight of a device's answer in a round."""
    return float(1 + (3 * device + number) % 5)


def answer(device, number, parameters):
    """Return a device's change of the parameters in a round."""
    return {
        "follows": ((device - parameters["follows"]) / 2).astype(np.float32),
        "shares_d": np.eye(DEVICES, dtype=np.float64)[device],
        "drawn": np.random.default_rng([device, number]).normal(size=4).astype(np.float32),
        "rounds": np.array(1, np.int64),
    }


def fit(parameters, config, options):
    device, number = int(options["device"]), config.round
    time.sleep(float(options["seconds"]))
    return FitResult(
        tree=answer(device, number, parameters), weight=weight(device, number), metrics={"who": 2.0**device}
    )


task = Task(name="audited", initial=initial, fit=fit)
