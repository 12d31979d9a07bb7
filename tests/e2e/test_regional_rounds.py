"""Regional rounds (HierFAVG) with real processes, against the same in a simulation, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgefl
from edgefl.local_fleet import LocalFleet
from edgefl.trees import SpooledTree

TASK = """
import numpy as np
from edgefl import FitResult, Task

def fit(parameters, config, options):
    part = int(options["part"])
    return FitResult(tree={"w": (part - parameters["w"]) / 2}, weight=part + 1, metrics={"loss": float(part)})

task = Task(name="numbers", initial=lambda: {"w": np.zeros(3)}, fit=fit)
"""


@pytest.mark.timeout(600)
def test_two_regions_train_twice_for_each_round_of_the_cloud(tmp_path: Path) -> None:
    folder = tmp_path / "counting"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "counting:task"\n')
    (folder / "counting.py").write_text(TASK)
    places = {"cam-0": "north", "cam-1": "north", "cam-2": "south", "cam-3": "south"}
    model, said = tmp_path / "model.safetensors", tmp_path / "run.json"
    with LocalFleet(tmp_path / "fleet") as fleet:
        fleet.start()
        for region in ("north", "south"):
            fleet.start_region(region)
        for index, (name, region) in enumerate(places.items()):
            fleet.enroll(name, region=region)
            fleet.start_agent(name, "--data", f"part={index}", "--data", "parts=4")
        fleet.command(
            "run", folder, "--cloud", fleet.url, "--rounds", 3, "--out", model, "--json", said,
            "--set", "rounds.clients=4", "--set", "rounds.quorum=4", "--set", "tiers.region_rounds=2", timeout_s=300,
        )  # fmt: skip
        assert not list((fleet.folder / "north" / "spool").glob("job-*/*/*"))  # nothing is kept of rounds that are over
    rounds = json.loads(said.read_text("utf-8"))["rounds"]
    simulated = edgefl.simulate(
        folder, clients=4, rounds=3, engine="loop", set={"tiers.fan_out": [2], "tiers.region_rounds": 2}
    )
    assert [one["admitted"] for one in rounds] == [4, 4, 4]
    assert SpooledTree(model)["w"].tolist() == pytest.approx(simulated.parameters["w"].tolist(), rel=1e-6)
    assert rounds[-1]["metrics"]["train_loss"] == pytest.approx(simulated.rounds[-1].metrics["train_loss"])
    w = 0.0
    for _ in range(3):
        changes = []
        for parts in ((0, 1), (2, 3)):
            there = w
            for _ in range(2):
                there += sum((part + 1) * (part - there) / 2 for part in parts) / sum(part + 1 for part in parts)
            changes.append((there, sum(part + 1 for part in parts)))
        w = sum(there * weight for there, weight in changes) / sum(weight for _, weight in changes)
    assert SpooledTree(model)["w"].tolist() == pytest.approx([w] * 3, rel=1e-6)
