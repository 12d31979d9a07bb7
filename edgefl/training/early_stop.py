"""The metric of `rounds.stop`, checked against a task before any work: does it exist, and which way is better?"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from edgefl.config import JobConfig
from edgefl.errors import ConfigError
from edgefl.guards import COUNT, DEVICES, STD, WORST_TENTH
from edgefl.stopping import make_stop
from edgefl.task import Task
from edgefl.training.metrics import LOSS

_Config = TypeVar("_Config", bound=JobConfig)


def with_stop_direction(config: _Config, task: Task) -> _Config:
    """Return the configuration with the direction of its stop metric, as the task says.

    Raises ConfigError for a metric that a task with a model does not have, and for one without a known direction.
    """
    stop = config.rounds.stop
    if not stop.metric:
        return config
    if task.model is not None:
        own = [LOSS, *task.metrics]
        on_devices = [f"{DEVICES}{name}" for name in own] if task.eval_data is not None else []
        known = ["train_loss", *(own if task.test_data is not None else []), *on_devices]
        spread = [f"{name}/{suffix}" for name in on_devices for suffix in (STD, WORST_TENTH)]
        if stop.metric not in {*known, *spread, DEVICES + COUNT}:
            raise ConfigError(f"rounds.stop.metric={stop.metric!r} is not measured for task {task.name!r}; it has "
                              f"{', '.join(known)}")  # fmt: skip
    if stop.direction == "auto":
        base = stop.metric.removeprefix(DEVICES).removesuffix(f"/{WORST_TENTH}")
        higher = task.direction_of(base)
        if higher is not None:
            stop = dataclasses.replace(stop, direction="max" if higher else "min")
    make_stop(stop)  # raises ConfigError
    return dataclasses.replace(config, rounds=dataclasses.replace(config.rounds, stop=stop))
