"""Goodput under failures, the fold of many updates, and the memory for one that is larger than memory should be.

Goodput: 8 sites train rounds of a minute in virtual time; each fails after 40 minutes on average and is down for 10, so
20% of the time. See `benchmarks.failing_sites` for the definition: 1.0 = nothing is lost but the time in which sites
are down. Decoupled DiLoCo (arXiv 2604.21428) reports 0.88, under its own model of failures and its own definition (the
fraction of accelerators' time that trains); it stands beside ours for orientation, not as a measurement.
The fold is a round as the cloud does it, from files: guard, mean, step, checks, SHA-256 of the new model. Its other
side is numpy alone, `total += weight * update` by blocks in float64. The large round runs in a real cloud.

    python -m benchmarks.goodput [--quick] [--json F]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.failing_sites import Sites, goodput
from benchmarks.folding import bare_add, fold, plain_add, write_model
from benchmarks.large_round import large_round
from benchmarks.report import Row, Target, command, median
from benchmarks.workload import RunFailedError
from edgefl.config import RoundsConfig

NUM_ROUNDS, FEW_ROUNDS = 1000, 200
UPDATE_BYTES, NUM_UPDATES, NUM_FILES = 100_000_000, 100, 10
LARGE_BYTES, SMALLER_BYTES = 4_000_000_000, 300_000_000
DEVICES = 4
DILOCO, DILOCO_GOODPUT = "Decoupled DiLoCo, as reported for its own model", 0.88
KEEP_ALIVE_S = 90.0  # until a broker reports a device that vanished: one and a half of its keep-alive


def measure(*, quick: bool) -> Iterator[Row]:
    """Yield the rows."""
    yield from _goodputs(FEW_ROUNDS if quick else NUM_ROUNDS)
    yield _fold_rate(10 if quick else NUM_UPDATES, 1 if quick else 3)
    yield from _large(SMALLER_BYTES if quick else LARGE_BYTES)
    yield from _large_below_a_region(SMALLER_BYTES if quick else LARGE_BYTES)


def _goodputs(num_rounds: int) -> Iterator[Row]:
    """Compare the window that adapts with rounds that wait for all, and with late updates that count."""
    for noticed_s, seen in ((0.0, "seen at once"), (KEEP_ALIVE_S, f"seen after {KEEP_ALIVE_S:g} s")):
        settings = {"count": num_rounds, "evaluate_every": 0, "wait_s": 600.0, "deadline_s": 600.0}
        ours, work = goodput(Sites(noticed_s=noticed_s), RoundsConfig(quorum=2, grace="auto", **settings))
        waits, _ = goodput(Sites(noticed_s=noticed_s), RoundsConfig(quorum=2, **settings))
        everybody, _ = goodput(Sites(noticed_s=noticed_s), RoundsConfig(quorum=8, **settings))
        yield Row(
            workload=f"8 sites, down 20%, failures {seen}",
            metric="goodput, rounds.grace=auto",
            unit="of what sites that are up can do",
            ours=ours,
            rival=DILOCO,
            theirs=DILOCO_GOODPUT,
            limit=1.0,
            targets=(Target(of="ours", at_least=0.95),),
            more_is_better=True,
            detail={"grace=none": waits, "quorum=all": everybody, "longest_round_s": work.longest_s},
        )
        late, _ = goodput(Sites(noticed_s=noticed_s), RoundsConfig(quorum=2, grace="auto", late="next", **settings))
        yield Row(
            workload=f"8 sites, down 20%, failures {seen}",
            metric="goodput, rounds.grace=auto and rounds.late=next",
            unit="of what sites that are up can do",
            ours=late,
            rival="rounds.late=refuse",
            theirs=ours,
            limit=1.0,
            targets=(Target(of="ratio", at_least=1.0),),
            more_is_better=True,
        )


def _fold_rate(num_updates: int, repeats: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="edgefl-") as folder:
        files = [Path(folder) / f"update-{number}" for number in range(NUM_FILES)]
        for number, file in enumerate(files):
            write_model(file, UPDATE_BYTES, seed=number)
        updates = [(1.0 + number, files[number % NUM_FILES]) for number in range(num_updates)]
        runs = [(fold(files[0], updates)[0], bare_add(updates), plain_add(updates)) for _ in range(repeats)]
    gigabytes = num_updates * UPDATE_BYTES / 1e9
    rates = [median(gigabytes / run[side] for run in runs) for side in range(3)]
    return Row(
        workload=f"{num_updates} updates of 100 MB, in {NUM_FILES} files",
        metric="fold rate",
        unit="GB/s",
        ours=rates[0],
        rival="numpy, in float64 by blocks, no checks",
        theirs=rates[1],
        targets=(Target(of="ratio", at_least=0.5),),
        more_is_better=True,
        detail={"seconds": [list(run) for run in runs], "numpy in float32, whole tensors, GB/s": rates[2]},
    )


def _large(num_bytes: int) -> Iterator[Row]:
    workload = f"{DEVICES} devices x {num_bytes / 1e9:g} GB"
    try:
        seen = large_round(num_bytes, DEVICES)
    except RunFailedError as cause:
        yield Row(workload=workload, metric="peak RSS of the cloud", unit="MB", skipped=str(cause))
        return
    target = (Target(of="ours", at_most=1000),)
    detail = {"idle_mb": seen.cloud_idle_mb, "round_s": seen.seconds, "fold_s": seen.fold_s}
    yield Row(workload=workload, metric="peak RSS of the cloud", unit="MB", ours=seen.cloud_peak_mb, targets=target,
              detail=detail)  # fmt: skip
    yield Row(workload=workload, metric="peak RSS of a fold", unit="MB", ours=seen.fold_peak_mb, targets=target)
    yield Row(workload=workload, metric="same bits in other blocks", unit="1 = yes", ours=float(seen.is_identical),
              targets=(Target(of="ours", at_least=1),), more_is_better=True)  # fmt: skip


def _large_below_a_region(num_bytes: int) -> Iterator[Row]:
    workload = f"{DEVICES} devices x {num_bytes / 1e9:g} GB below a region"
    try:
        seen = large_round(num_bytes, DEVICES, "north")
    except RunFailedError as cause:
        yield Row(workload=workload, metric="peak RSS of the region", unit="MB", skipped=str(cause))
        return
    target = (Target(of="ours", at_most=1000),)
    yield Row(workload=workload, metric="peak RSS of the region", unit="MB", ours=seen.region_peak_mb, targets=target,
              detail={"idle_mb": seen.region_idle_mb, "round_s": seen.seconds})  # fmt: skip
    yield Row(workload=workload, metric="peak RSS of the cloud", unit="MB", ours=seen.cloud_peak_mb, targets=target,
              detail={"idle_mb": seen.cloud_idle_mb})  # fmt: skip
    yield Row(workload=workload, metric="same bits in other blocks", unit="1 = yes", ours=float(seen.is_identical),
              targets=(Target(of="ours", at_least=1),), more_is_better=True)  # fmt: skip


if __name__ == "__main__":
    command(measure, __doc__)()
