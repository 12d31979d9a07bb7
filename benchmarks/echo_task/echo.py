"""A task that returns the model unchanged, without training.

Each fit reports when it ran (CLOCK_MONOTONIC, the same for the whole machine), so that the time between
rounds can be measured from outside, including everything between them.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgefl import FitResult, Task
from edgefl.config import TrainConfig

MODEL_BYTES = 100_000
TENSORS = 4


def initial() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    size = MODEL_BYTES // 4 // TENSORS
    return {f"w{i}": rng.standard_normal(size, np.float32) for i in range(TENSORS)}


def fit(parameters: Mapping[str, Any], _train: TrainConfig, _options: Mapping[str, str]) -> FitResult:
    return FitResult(tree=parameters, weight=1.0, metrics={"train_fit_s": time.monotonic()})


task = Task(name="echo", initial=initial, fit=fit)
