"""No learning: each device answers with the delta and the weight that its data options say."""

import time
from pathlib import Path

import numpy as np

from edgefl import FitResult, Task


def initial():
    return {"w": np.zeros(3, np.float32), "n": np.array(0, np.int64)}


def fit(parameters, config, options):
    with Path(options["calls"]).open("a", encoding="utf-8") as calls:
        calls.write("fit\n")
    if seconds := float(options.get("seconds", "0")):  # under a faked clock, sleeping fails
        time.sleep(seconds)
    delta = float(options["delta"])
    tree = {"w": np.full(3, delta, np.float32), "n": np.array(1, np.int64)}
    return FitResult(tree=tree, weight=float(options["weight"]), metrics={"delta": delta})


task = Task(name="numbers", initial=initial, fit=fit)
