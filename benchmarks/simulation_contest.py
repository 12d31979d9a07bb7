"""Run the systems of a simulation benchmark, each in a separate process, in turn, and collect their results.

A rate is the number of clients in all rounds but the first, divided by their seconds: the first includes start and
warm-up. Time and memory are measured in separate runs, because sampling costs CPU.
Invariant: when a run has ended, by return, failure or Ctrl-C, none of its processes is alive.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.family import Family
from benchmarks.memory import tree_rss_mb
from benchmarks.report import installed, median
from benchmarks.workload import RunFailedError
from edgefl.local_fleet import LoggedProcess

ROOT = Path(__file__).resolve().parents[1]
RUN_S = 400.0  # deadline of any one run
SAMPLE_S = 0.2  # interval of memory samples
RESULT = '{"round_s"'  # beginning of a system's result line
REPORT = "out.json"  # what `edgefl simulate --json` writes in a run's folder

Command = Callable[[Path, int], Sequence[str | Path]]  # (folder, rounds)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A system to measure, and how it is started."""

    name: str
    command: Command
    needs: tuple[str, ...] = ()  # packages; the first one gives the version
    threads: int = 0  # OpenMP threads; 0: the default

    @property
    def absent(self) -> str | None:
        """Return what is missing, if anything."""
        missing = [package for package in self.needs if not installed(package)]
        return f"{' and '.join(missing)} must be installed: `make bench` installs them" if missing else None


def module(name: str, workload: str, *options: str) -> Command:
    """Return the command of one of `benchmarks.simulation_rivals`."""

    def command(_folder: Path, rounds: int) -> list[str]:
        start = [sys.executable, "-m", f"benchmarks.simulation_rivals.{name}"]
        return [*start, workload, "--rounds", str(rounds), *options]

    return command


def torchrun(name: str, workload: str, processes: int) -> Command:
    """Return the command of a system with several processes, connected by torch.distributed."""

    def command(_folder: Path, rounds: int) -> list[str]:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return [*start, "-m", f"benchmarks.simulation_rivals.{name}", workload, "--rounds", str(rounds)]

    return command


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one run."""

    round_s: tuple[float, ...]
    accuracy: float | None
    detail: Mapping[str, Any]
    command_s: float  # of the whole process
    peak_mb: float | None = None  # of all its processes at once

    @property
    def rest_s(self) -> float:
        """Seconds of a round after the first, their mean."""
        return sum(self.round_s[1:]) / (len(self.round_s) - 1)

    @property
    def middle_s(self) -> float:
        """Seconds of a round after the first, their median."""
        return statistics.median(self.round_s[1:])


@dataclass
class Side:
    """One system's runs, or why there are none."""

    contestant: Contestant
    rounds: int
    repeats: int = 1
    skipped: str | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    peak_mb: float | None = None

    def __post_init__(self) -> None:
        self.skipped = self.skipped or self.contestant.absent

    @property
    def name(self) -> str:
        """Return its name, with the version of its package."""
        version = installed(self.contestant.needs[0]) if self.contestant.needs else None
        return f"{self.contestant.name} {version}" if version else self.contestant.name

    def turn(self, *, memory: bool = False) -> None:
        """Run once more, unless it has finished its turns or failed."""
        if self.skipped or (not memory and len(self.outcomes) >= self.repeats):
            return
        print(f"{self.name} ...", file=sys.stderr, flush=True)
        try:
            outcome = run(self.contestant, self.rounds, memory=memory)
        except RunFailedError as failure:
            self.skipped = f"{self.name}: {failure}"
            return
        if memory:
            self.peak_mb = outcome.peak_mb
        else:
            self.outcomes.append(outcome)

    def typical(self, value: Callable[[Outcome], float]) -> float | None:
        return median(value(outcome) for outcome in self.outcomes)

    def rate(self, clients: int) -> float | None:
        """Clients a second, where a round has so many."""
        round_s = self.typical(lambda outcome: outcome.rest_s)
        return clients / round_s if round_s else None

    @property
    def accuracy(self) -> float | None:
        return next((outcome.accuracy for outcome in self.outcomes), None)

    def detail(self) -> dict[str, object]:
        rounds = [[round(second, 5) for second in outcome.round_s] for outcome in self.outcomes]
        said = dict(self.outcomes[0].detail) if self.outcomes else {}
        return {"round_s": rounds, "accuracy": self.accuracy, "peak_mb": self.peak_mb, **said}


def run(contestant: Contestant, rounds: int, *, memory: bool = False) -> Outcome:
    """Run a system to its end; raises RunFailedError."""
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    env = {"PYTHONPATH": path, **({"OMP_NUM_THREADS": str(contestant.threads)} if contestant.threads else {})}
    with tempfile.TemporaryDirectory(prefix="simulation-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        with Family(folder, env) as family:
            start_s = time.perf_counter()
            process = family.start("contestant", contestant.command(folder, rounds))
            peak_mb = _wait(process, memory=memory)
            seconds, status = time.perf_counter() - start_s, process.popen.returncode
        log = process.log.read_text(encoding="utf-8")  # complete: all its writers have ended
        if status != 0:
            last = " | ".join(log.strip().splitlines()[-4:])
            raise RunFailedError(f"ended with status {status}: {last[-600:]}")
        said = _said(folder, log)
    if len(said["round_s"]) != rounds:
        raise RunFailedError(f"{len(said['round_s'])} rounds instead of {rounds}")
    return Outcome(
        round_s=tuple(said["round_s"]),
        accuracy=said["accuracy"],
        detail=said["detail"],
        command_s=seconds,
        peak_mb=peak_mb if memory else None,
    )


def _wait(process: LoggedProcess, *, memory: bool) -> float:
    """Wait for a process to end; return its peak memory, if it is sampled."""
    peak_mb, deadline_s = 0.0, time.monotonic() + RUN_S
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            process.popen.wait(SAMPLE_S if memory else left_s)
        except subprocess.TimeoutExpired:
            peak_mb = max(peak_mb, tree_rss_mb(process.pid)) if memory else 0.0
        else:
            return peak_mb
    raise RunFailedError(f"had not ended within {RUN_S:g} s")


def _said(folder: Path, log: str) -> dict[str, Any]:
    if (report := folder / REPORT).exists():
        said = json.loads(report.read_text(encoding="utf-8"))
        seconds = [float(one["seconds"]) for one in said["rounds"]]
        detail = {"engine": said["engine"], "why": said["engine_reason"]}
        return {"round_s": seconds, "accuracy": said["final"].get("accuracy"), "detail": detail}
    at = log.rfind(RESULT)
    if at < 0:
        raise RunFailedError("it printed no result")
    return json.JSONDecoder().raw_decode(log, at)[0]
