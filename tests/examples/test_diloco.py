"""The DiLoCo example learns; its loss beside synchronous training is measured by benchmarks.sites."""

from __future__ import annotations

from pathlib import Path

import edgefl
from edgefl.config import JobConfig, load_config
from edgefl.task import load_task
from edgefl.training.samples import train_samples

FOLDER = Path(__file__).parents[2] / "examples" / "diloco"


def test_sites_learn_between_two_exchanges():
    config = load_config(JobConfig, FOLDER / "config.toml", ["train.steps=12", "train.warmup_rounds=0"])
    result = edgefl.simulate(FOLDER, clients=4, rounds=2, engine="loop", config=config)
    first, last = (one.metrics["loss"] for one in result.rounds)
    assert last < first < 4.85  # log(128): a model that knows nothing


def test_the_sites_parts_do_not_overlap():
    task = load_task(str(FOLDER))
    parts = [train_samples(task, {"part": str(part), "parts": "4"}) for part in range(4)]
    everything = len(train_samples(task, {}))
    assert sum(len(one) for one in parts) == everything
    assert min(len(one) for one in parts) > everything / 8
