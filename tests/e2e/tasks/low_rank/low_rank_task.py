"""No learning: each device answers with drawn factors, of the rank and with the weight that its data options say."""

import time

import numpy as np

from edgefl import FitResult, Task

ROWS, COLUMNS = 96, 80


def initial():
    return {
        "up@lora_B": np.zeros((ROWS, 0), np.float32), "up@lora_A": np.zeros((0, COLUMNS), np.float32),
        "head": np.zeros(3, np.float32),
    }  # fmt: skip


def factors(number, rank, round_number):
    """Return a device's B and A of a round."""
    rng = np.random.default_rng([number, rank, round_number])
    drawn = rng.normal(size=(ROWS, rank)), rng.normal(size=(rank, COLUMNS))
    return tuple(one.astype(np.float32) / 4 for one in drawn)


def fit(parameters, config, options):
    if seconds := float(options.get("seconds", "0")):
        time.sleep(seconds)
    number, rank = int(options["number"]), int(options["rank"])
    left, right = factors(number, rank, config.round)
    tree = {"up@lora_B": left, "up@lora_A": right, "head": np.full(3, number, np.float32)}
    moved = float(np.abs(parameters["up@lora"]).max(initial=0.0))
    return FitResult(tree=tree, weight=float(options["weight"]), metrics={"moved": moved})


task = Task(name="low-rank", initial=initial, fit=fit)
