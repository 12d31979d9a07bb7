"""Regions between devices and the cloud, against the same devices without them: exactness, bytes, and time.

Both fleets are real processes with mutual TLS on this machine, and take turns. The bytes into the cloud are those of
models and updates, up and down, as `edgefl run --json` counts them.

    python -m benchmarks.tiers [--quick] [--json F]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import edgefl
from benchmarks.fleet import ECHO_LR, START_S, echo_task, run_job
from benchmarks.report import Row, Target, command
from benchmarks.rounds import seconds_of
from benchmarks.workload import TENSORS, RunFailedError, Workload
from edgefl.errors import EdgeflError
from edgefl.local_fleet import LocalFleet
from edgefl.trees import SpooledTree, Tree

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
EXACT = 1e-6
DIFFERENCE = "largest difference of a parameter from flat"
RUN_S = 900.0
FLAT: Mapping[str, str] = {}  # no region
TWO_REGIONS = {"north": "", "south": ""}  # region -> its parent; empty = the cloud
DEEP = {"north": "", "south": "", "far-south": "south"}


def measure(*, quick: bool) -> Iterator[Row]:
    """Run everything, and yield the rows as they are done."""
    yield _simulated()
    yield from _real(quick=quick)
    yield _bytes()
    yield _time(Workload(clients=8, megabytes=10 if quick else 100), rounds=2 if quick else 3)


def _simulated() -> Row:
    """40 clients of unequal size: flat, and below two tiers of regions."""
    settings = {"train.lr": 0.1, "population.partitioner": "dirichlet", "population.alpha": 0.5}
    flat, tiered = (
        edgefl.simulate(DIGITS, clients=40, rounds=3, engine="loop", set={**settings, **more})
        for more in ({}, {"tiers.fan_out": [5, 2]})
    )
    return Row(
        workload="40 simulated, 8 regions in 4 regions", metric=DIFFERENCE,
        unit="absolute", ours=_difference(flat.parameters, tiered.parameters),
        targets=(Target(of="ours", at_most=EXACT),),
    )  # fmt: skip


def _real(*, quick: bool) -> Iterator[Row]:
    """Eight devices of unequal size below regions at two depths, against the same without regions."""
    devices = 4 if quick else 8
    places = ["north", "south", "far-south", "north", "far-south", "south", "north", "south"][:devices]
    workload = f"{devices} devices, 3 regions at two depths"
    try:
        flat, tiered = (_digits(regions, places, rounds=3) for regions in (FLAT, DEEP))
    except RunFailedError as failure:
        yield Row(workload=workload, metric=DIFFERENCE, unit="absolute", skipped=str(failure))
        return
    yield Row(
        workload=workload, metric=DIFFERENCE, unit="absolute",
        ours=_difference(flat[0], tiered[0]), targets=(Target(of="ours", at_most=EXACT),),
    )  # fmt: skip
    yield Row(
        workload=workload, metric="counted in 3 rounds", unit="updates",
        ours=sum(one["admitted"] for one in tiered[1]["rounds"]), rival="flat",
        theirs=sum(one["admitted"] for one in flat[1]["rounds"]), more_is_better=True,
        targets=(Target(of="ratio", at_least=1.0),),
    )  # fmt: skip


def _bytes() -> Row:
    """Models and updates into and out of the cloud: 40 devices in 4 regions."""
    flat, tiered = (
        edgefl.simulate(DIGITS, clients=40, rounds=2, engine="loop", set=more) for more in ({}, {"tiers.fan_out": [10]})
    )
    ours, theirs = (sum(one.up_bytes + one.down_bytes for one in result.rounds) for result in (tiered, flat))
    return Row(
        workload="40 devices in 4 regions", metric="bytes of the cloud in 2 rounds", unit="MB", ours=ours / 1e6,
        rival="flat", theirs=theirs / 1e6, targets=(Target(of="ratio", at_least=9.0),),
    )  # fmt: skip


def _time(workload: Workload, *, rounds: int) -> Row:
    """A round without training, through two regions and without them."""
    row = {"workload": f"{workload} through 2 regions", "metric": "a round", "unit": "s", "rival": "flat"}
    try:
        theirs, ours = (_echo(regions, workload, rounds) for regions in (FLAT, TWO_REGIONS))
    except RunFailedError as failure:
        return Row(**row, skipped=str(failure))
    return Row(
        **row, ours=statistics.median(ours), theirs=statistics.median(theirs),
        targets=(Target(of="ratio", at_least=1 / 1.3),), detail={"regions": list(ours), "flat": list(theirs)},
    )  # fmt: skip


def _digits(regions: Mapping[str, str], places: Sequence[str], rounds: int) -> tuple[Tree, dict[str, Any]]:
    """Train the digits; return the parameters and the run's JSON."""
    data = [("--data", f"part={index}", "--data", f"parts={2 * len(places)}") for index in range(len(places))]
    with _fleet(regions, places, data) as fleet:
        settings = {"rounds.clients": len(places), "rounds.quorum": len(places), "train.lr": 0.1}
        model, said = fleet.folder / "model.safetensors", fleet.folder / "run.json"
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        fleet.command(
            "run", DIGITS, "--cloud", fleet.url, "--rounds", rounds, "--out", model, "--json", said, *options,
            timeout_s=RUN_S,
        )  # fmt: skip
        return {name: np.array(array) for name, array in SpooledTree(model).items()}, json.loads(
            said.read_text("utf-8")
        )


@contextmanager
def _fleet(regions: Mapping[str, str], places: Sequence[str], options: Sequence[Sequence[str]]) -> Iterator[LocalFleet]:
    """Start a cloud, the regions and their devices; without regions, all devices below the cloud."""
    with tempfile.TemporaryDirectory(prefix="edgefl-", ignore_cleanup_errors=True) as folder:
        try:
            with LocalFleet(Path(folder)) as fleet:
                fleet.start()
                for name, parent in regions.items():
                    fleet.start_region(name, parent=parent)
                agents = []
                for index, (place, own) in enumerate(zip(places, options, strict=True)):
                    fleet.enroll(f"agent-{index}", region=place if regions else "")
                    agents.append(fleet.start_agent(f"agent-{index}", *own))
                for agent in agents:
                    agent.wait_for("mqtt.up", START_S)
                yield fleet
        except (EdgeflError, subprocess.TimeoutExpired) as cause:
            raise RunFailedError(str(cause)) from cause


def _echo(regions: Mapping[str, str], workload: Workload, rounds: int) -> tuple[float, ...]:
    print(f"{workload}: {len(regions)} regions ...", file=sys.stderr, flush=True)
    places = [list(regions or {"": ""})[index % max(1, len(regions))] for index in range(workload.clients)]
    with _fleet(regions, places, [()] * workload.clients) as fleet:
        task = echo_task(fleet.folder, workload.model_bytes, TENSORS)
        settings = {"rounds.clients": workload.clients, "rounds.quorum": workload.clients, "server.lr": ECHO_LR}
        report = run_job(fleet, task, rounds=rounds + 1, settings=settings, deadline_s=RUN_S)
    return seconds_of(report["rounds"], workload)[1]


def _difference(first: Tree, second: Tree) -> float:
    return max(float(np.abs(first[name].astype(np.float64) - second[name]).max(initial=0.0)) for name in first)


if __name__ == "__main__":
    command(measure, __doc__)()
