"""The time of a round without training: edgefl with TLS, Flower without TLS, and the lower bound of the machine.

Real processes on loopback; the three take turns. A round lasts from its start to the next; the first is not
counted. Memory of a server is the sum of its processes' peaks, as the kernel recorded them, so it does not slow
down the timed run: edgefl's is the cloud with its broker, Flower's the SuperLink and the ServerApp.

    python -m benchmarks.rounds [--quick] [--json F]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks import floor, flower_rival
from benchmarks.fleet import ECHO_LR, connected_fleet, echo_task, run_job
from benchmarks.memory import tree_peak_rss_mb, tree_rss_mb
from benchmarks.report import Row, Target, command, median
from benchmarks.workload import TENSORS, RunFailedError, RunResult, Workload

TEN_SMALL = Workload(clients=10, megabytes=0.1)
TWO_SMALL = Workload(clients=2, megabytes=0.1)
TEN_LARGE = Workload(clients=10, megabytes=100)
TWO_LARGE = Workload(clients=2, megabytes=100)

RUN_S = 600.0  # deadline of any one run
ROUND_S = 120.0  # deadline of one round
SPEEDUP: Mapping[Workload, float] = {TEN_SMALL: 100, TWO_SMALL: 150, TEN_LARGE: 7}
SECONDS: Mapping[Workload, float] = {TEN_SMALL: 0.1, TEN_LARGE: 4.5}


@dataclass
class Side:
    """The runs of one system on one workload, or why there are none."""

    name: str
    run: Callable[[Workload, int, float], RunResult]
    rounds: int
    skipped: str | None = None
    results: list[RunResult] = field(default_factory=list)

    def turn(self, workload: Workload) -> None:
        if self.skipped:
            return
        print(f"{workload}: {self.name} ...", file=sys.stderr, flush=True)
        try:
            self.results.append(self.run(workload, self.rounds, RUN_S))
        except RunFailedError as failure:
            self.skipped = f"{self.name}: {failure}"

    def round_s(self) -> float | None:
        return median(second for result in self.results for second in result.round_s)

    def centre_mb(self) -> float | None:
        return max((result.centre_mb for result in self.results if result.centre_mb is not None), default=None)

    def idle_mb(self) -> float | None:
        return median(result.idle_mb for result in self.results if result.idle_mb is not None)

    def detail(self) -> dict[str, object]:
        rounds = [[round(second, 5) for second in result.round_s] for result in self.results]
        return {"first_s": [round(result.first_s, 5) for result in self.results], "round_s": rounds}


@dataclass(frozen=True)
class Contest:
    """All systems on one workload."""

    workload: Workload
    ours: Side
    theirs: Side
    floor: Side

    @property
    def skipped(self) -> str | None:
        return self.ours.skipped or self.theirs.skipped

    def row(self, metric: str, unit: str, value: Callable[[Side], float | None], *targets: Target) -> Row:
        return Row(
            workload=str(self.workload),
            metric=metric,
            unit=unit,
            ours=value(self.ours),
            rival=self.theirs.name,
            theirs=value(self.theirs),
            limit=value(self.floor),
            targets=targets,
            skipped=self.skipped or self.floor.skipped,
            detail={side.name: side.detail() for side in (self.ours, self.theirs, self.floor)},
        )


def measure(*, quick: bool) -> Iterator[Row]:
    """Run all workloads, then compare."""
    contests = {workload: _contest(workload, quick=quick) for workload in (TWO_SMALL, TEN_SMALL, TWO_LARGE, TEN_LARGE)}
    for workload, contest in contests.items():
        targets = [Target(of="ratio", at_least=SPEEDUP[workload])] if workload in SPEEDUP else []
        targets += [Target(of="ours", at_most=SECONDS[workload])] if workload in SECONDS else []
        yield contest.row("a round", "s", Side.round_s, *targets)
    yield contests[TWO_LARGE].row("peak RSS of the centre", "MB", Side.centre_mb)
    yield contests[TEN_LARGE].row("peak RSS of the centre", "MB", Side.centre_mb, Target(of="ours", at_most=600))
    yield _growth(contests[TWO_LARGE], contests[TEN_LARGE])
    yield contests[TWO_SMALL].row("idle RSS of an agent", "MB", Side.idle_mb, Target(of="ours", at_most=90))


def _contest(workload: Workload, *, quick: bool) -> Contest:
    large = workload.megabytes >= 10
    ours = Side("edgefl", run_ours, (2 if quick else 4) if large else (10 if quick else 40))
    theirs = Side(flower_rival.name() or "Flower", flower_rival.run, 2 if large or quick else 4)
    if flower_rival.name() is None:
        theirs.skipped = "Flower is not installed: make bench installs it"
    elif quick and large:
        theirs.skipped = f"{theirs.name} takes minutes over {workload.megabytes:g} MB; left out by --quick"
    contest = Contest(workload, ours, theirs, Side("floor", floor.run, ours.rounds))
    for _ in range(1 if quick else 2):
        for side in (contest.ours, contest.theirs, contest.floor):
            side.turn(workload)
    return contest


def _growth(two: Contest, ten: Contest) -> Row:
    """Compare the server's memory for ten clients with that for two."""

    def grown(few: Side, many: Side) -> float | None:
        low, high = few.centre_mb(), many.centre_mb()
        return high / low if low and high else None

    return Row(
        workload=f"{ten.workload} over {two.workload}",
        metric="peak RSS of the centre",
        unit="times",
        ours=grown(two.ours, ten.ours),
        rival=ten.theirs.name,
        theirs=grown(two.theirs, ten.theirs),
        targets=(Target(of="ours", at_most=1.1),),
        skipped=two.skipped or ten.skipped,
    )


def run_ours(workload: Workload, rounds: int, deadline_s: float) -> RunResult:
    """Run `rounds` rounds after the first, with real processes; raises RunFailedError."""
    with connected_fleet(workload.clients) as fleet:
        if fleet.cloud is None:
            raise RunFailedError("the fleet has no cloud")
        idle_mb = statistics.median(tree_rss_mb(agent.pid) for agent in fleet.agents.values())
        task = echo_task(fleet.folder, workload.model_bytes, TENSORS)
        settings = {
            "rounds.clients": workload.clients,
            "rounds.quorum": workload.clients,
            "rounds.deadline_s": ROUND_S,
            "server.lr": ECHO_LR,
        }
        report = run_job(fleet, task, rounds=rounds + 1, settings=settings, deadline_s=deadline_s)
        centre_mb = tree_peak_rss_mb(fleet.cloud.pid)
    first_s, round_s = seconds_of(report["rounds"], workload)
    return RunResult(first_s=first_s, round_s=round_s, centre_mb=centre_mb, idle_mb=idle_mb)


def seconds_of(rounds: list[dict[str, Any]], workload: Workload) -> tuple[float, tuple[float, ...]]:
    """Return the seconds of the first round and of the others: by the job, or by the clock if that is longer."""
    if any(one["admitted"] != workload.clients for one in rounds):
        raise RunFailedError(f"{workload}: not every agent was in every round: {[one['admitted'] for one in rounds]}")
    if any(one["down_bytes"] < workload.model_bytes for one in rounds):
        raise RunFailedError(f"{workload}: rounds without a new model: {[one['down_bytes'] for one in rounds]} bytes")
    said = tuple(float(one["seconds"]) for one in rounds)
    fits_s = [float(one["metrics"]["train_fit_s"]) for one in rounds]  # means over the agents
    by_clock = tuple(after - before for before, after in pairwise(fits_s))
    return said[0], max(said[1:], by_clock, key=statistics.median)


if __name__ == "__main__":
    command(measure, __doc__)()
