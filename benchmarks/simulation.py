"""How many clients per second a simulation trains: edgefl and other systems, with the same work for all.

Every system runs in a separate process and gets the same partition, cohorts, initial weights and sample
order (`benchmarks.simulation_workloads`), and two cores. All take turns; rates do not count the first round;
the limit is centralised SGD over the same number of samples. Accuracy is on held-out samples after the same
number of rounds. Memory is the resident memory of all processes of a system, sampled in a separate run.

    python -m benchmarks.simulation [--quick] [--json F] [--only digits-cnn] [--readme docs/numbers.md]
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.report import Row, Target, leave, say
from benchmarks.simulation_contest import REPORT, ROOT, Contestant, Side, module, torchrun
from benchmarks.simulation_readme import write_readme
from benchmarks.simulation_workloads import DECODED_VARIABLE, WORKLOADS, Workload, decode_cifar

CORES = 2  # processes or threads of each system
REPEATS = 2  # of systems with a target, and of edgefl
_FLOWER = ("flwr", "ray")
MILLION = 1_000_000
FLOWER_APP = ROOT / "examples" / "flower-app"
APP_NODES, APP_ROUNDS, APP_QUICK_ROUNDS = 100, 16, 3
MNIST_ROUNDS = 100  # number of rounds in its figure

AUTO, COMPILED = "edgefl", "edgefl, compiled steps"
CENTRAL, FLOWER, PFL = "centralised SGD", "Flower on Ray", "pfl-research in 2 processes"
RATES: Mapping[str, Mapping[str, float]] = {  # required ratio to the other system's rate
    "digits-cnn": {CENTRAL: 0.85, FLOWER: 9, PFL: 1.9},
    "digits-mlp": {CENTRAL: 0.6},
    "digits-lr": {FLOWER: 70},
    "cifar": {FLOWER: 2, PFL: 1},
}
COMPILED_RATES: Mapping[str, Mapping[str, float]] = {"digits-cnn": {CENTRAL: 1}, "cifar": {PFL: 1.3}}
MEMORY: Mapping[str, Mapping[str, float]] = {"cifar": {FLOWER: 2}}  # required ratio of its memory to ours
ENGINES: Mapping[str, Sequence[str]] = {  # edgefl engines that are also measured separately
    "digits-cnn": ("loop", "stacked", "pool"),
    "digits-mlp": ("loop", "stacked", "pool"),
    "digits-lr": ("loop", "stacked", "pool"),
    "cifar": ("loop", "pool"),
    "mnist-lr": ("loop", "stacked"),
}
WITHOUT: Mapping[str, Sequence[str]] = {"digits-mlp": (FLOWER,), "cifar": ("torch.func.vmap",)}


def contestants(workload: Workload) -> list[Contestant]:
    """Return the systems for a training workload, edgefl first."""
    name = workload.name
    ours = [Contestant(name=AUTO, command=module("ours", name))]
    if name in COMPILED_RATES:
        ours.append(Contestant(name=COMPILED, command=module("ours", name, "--settings", "engine.compile=true")))
    ours += [
        Contestant(name=f"edgefl {engine}", command=module("ours", name, "--engine", engine))
        for engine in ENGINES[name]
    ]
    theirs = [
        Contestant(name=CENTRAL, command=module("centralised", name), threads=CORES),
        Contestant(name="plain loop", command=module("plain", name), threads=1),
        Contestant(name="plain loop in 2 processes", command=module("plain", name, "--processes", "2"), threads=1),
        Contestant(name="torch.func.vmap", command=module("vmapped", name), threads=CORES),
        Contestant(name="pfl-research", command=module("pfl_research", name), threads=1, needs=("pfl",)),
        Contestant(name=PFL, command=torchrun("pfl_research", name, 2), threads=1, needs=("pfl",)),
        Contestant(name=FLOWER, command=module("flower_ray", name), threads=1, needs=_FLOWER),
    ]
    return [*ours, *(one for one in theirs if one.name not in WITHOUT.get(name, ()))]


@dataclass(frozen=True)
class Contest:
    """All systems on one workload."""

    workload: Workload
    sides: Mapping[str, Side]

    def rates(self) -> Iterator[Row]:
        cohort, central = self.workload.cohort, self.sides[CENTRAL]
        for side in self._rivals():
            least = RATES.get(self.workload.name, {}).get(side.contestant.name)
            yield self._row(
                side,
                metric="clients a second",
                unit="1/s",
                value=lambda one: one.rate(cohort),
                limit=central.rate(cohort),
                targets=(Target(of="ratio", at_least=least),) if least else (),
                more_is_better=True,
            )

    def compiled_rates(self) -> Iterator[Row]:
        cohort = self.workload.cohort
        for name, least in COMPILED_RATES.get(self.workload.name, {}).items():
            yield self._row(
                self.sides[name],
                ours=self.sides[COMPILED],
                metric="clients a second, compiled steps",
                unit="1/s",
                value=lambda one: one.rate(cohort),
                limit=self.sides[CENTRAL].rate(cohort),
                targets=(Target(of="ratio", at_least=least),),
                more_is_better=True,
            )

    def accuracies(self) -> Iterator[Row]:
        rounds = self.sides[AUTO].rounds
        for side in self._rivals():
            if side.contestant.name != CENTRAL:  # it is not federated
                yield self._row(
                    side,
                    metric=f"accuracy after {rounds} rounds",
                    unit="1",
                    value=lambda one: one.accuracy,
                    more_is_better=True,
                )

    def memory(self) -> Iterator[Row]:
        for name in (FLOWER, PFL):
            if name in self.sides:
                least = MEMORY.get(self.workload.name, {}).get(name)
                yield self._row(
                    self.sides[name],
                    metric="peak RSS",
                    unit="MB",
                    value=lambda one: one.peak_mb,
                    targets=(Target(of="ratio", at_least=least),) if least else (),
                )

    def _rivals(self) -> list[Side]:
        return [side for name, side in self.sides.items() if name != AUTO]

    def _row(
        self, side: Side, *, value: Callable[[Side], float | None], ours: Side | None = None, **said: object
    ) -> Row:
        ours = ours or self.sides[AUTO]
        return Row(
            workload=self.workload.about,
            rival=side.name,
            ours=value(ours),
            theirs=value(side),
            skipped=ours.skipped or side.skipped,
            detail={one.name: one.detail() for one in (ours, side)},
            **said,
        )


def train(workload: Workload, *, quick: bool) -> Iterator[Row]:
    """Run all systems on one workload, then compare."""
    contest = _contest(workload, contestants(workload), quick=quick)
    yield from contest.rates()
    yield from contest.compiled_rates()
    yield from contest.accuracies()
    yield from contest.memory()


def _contest(workload: Workload, who: Sequence[Contestant], *, quick: bool) -> Contest:
    rounds = workload.quick_rounds if quick else workload.rounds
    measured = {AUTO, COMPILED, CENTRAL, *RATES.get(workload.name, {}), FLOWER}
    sides = {
        one.name: Side(one, rounds, repeats=REPEATS if one.name in measured and not quick else 1, skipped=lack)
        for lack in (workload.missing(),)
        for one in who
    }
    with _decoded(workload):
        for _ in range(REPEATS):
            for side in sides.values():
                side.turn()
        for name in (AUTO, PFL, FLOWER):
            if name in sides:
                sides[name].turn(memory=True)
    return Contest(workload, sides)


@contextmanager
def _decoded(workload: Workload) -> Iterator[None]:
    """Decode CIFAR-10 once for all systems."""
    if workload.needs != "cifar10" or workload.missing():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="cifar-") as folder:
        decode_cifar(Path(folder))
        os.environ[DECODED_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[DECODED_VARIABLE]


def train_mnist(workload: Workload, *, quick: bool) -> Iterator[Row]:
    """Compare the seconds of a hundred rounds, and of the whole command."""
    contest = _contest(workload, [_mnist_command(workload), *contestants(workload)[1:]], quick=quick)
    ours = contest.sides[AUTO]
    for side in contest.sides.values():
        if side is ours:
            continue
        targets = {
            CENTRAL: (Target(of="ours", at_most=1.1),),
            FLOWER: (Target(of="ratio", at_least=20),),
        }
        yield contest._row(  # noqa: SLF001 - it is this module's
            side,
            metric="100 rounds",
            unit="s",  # edgefl: with the first round; others: without the extra time of their first round
            value=lambda one: _mnist_seconds(one, first=one is ours),
            targets=targets.get(side.contestant.name, ()),
        )
    yield contest._row(  # noqa: SLF001 - it is this module's
        contest.sides[FLOWER],
        metric="whole command",
        unit="s",
        value=lambda one: one.typical(lambda outcome: outcome.command_s),
        targets=(Target(of="ours", at_most=3.0),),
    )
    yield from contest.accuracies()
    yield from contest.memory()


def _mnist_command(workload: Workload) -> Contestant:
    """Return the user's command; its time includes imports and data."""

    def command(folder: Path, rounds: int) -> list[str | Path]:
        settings = (
            f"rounds.clients={workload.cohort}",
            f"train.batch_size={workload.batch}",
            f"train.lr={workload.lr}",
        )
        sets = [part for setting in settings for part in ("--set", setting)]
        start = [sys.executable, "-c", "from edgefl.app.cli import main; main()", "simulate", workload.reference]
        options = ["--clients", workload.clients, "--rounds", rounds, "--evaluate-every", rounds]
        return [*start, *map(str, options), *sets, "--json", folder / REPORT]

    return Contestant(name=AUTO, command=command)


def _mnist_seconds(side: Side, *, first: bool) -> float | None:
    def seconds(outcome: object) -> float:
        return (sum(outcome.round_s) / len(outcome.round_s) if first else outcome.rest_s) * MNIST_ROUNDS

    return side.typical(seconds)


def flower_app(*, quick: bool) -> Iterator[Row]:
    """Run an unmodified Flower app in edgefl and in Flower."""

    def side(name: str, engine: str, needs: tuple[str, ...] = ()) -> Side:
        def command(_folder: Path, rounds: int) -> list[str | Path]:
            start = [sys.executable, "-m", "benchmarks.simulation_rivals.flower_folder", FLOWER_APP]
            return [*start, "--engine", engine, "--nodes", str(APP_NODES), "--rounds", str(rounds)]

        contestant = Contestant(name=name, command=command, threads=1, needs=needs)
        return Side(contestant, APP_QUICK_ROUNDS if quick else APP_ROUNDS, repeats=1 if quick else REPEATS)

    ours, theirs = side(AUTO, "edgefl"), side(FLOWER, "flower", _FLOWER)
    for _ in range(REPEATS):
        ours.turn()
        theirs.turn()
    same = {
        "workload": f"an unmodified Flower app (PyTorch), {APP_NODES} nodes",
        "rival": theirs.name,
        "skipped": ours.skipped or theirs.skipped,
        "detail": {one.name: one.detail() for one in (ours, theirs)},
    }
    rates = [one.typical(lambda outcome: APP_NODES / outcome.middle_s) for one in (ours, theirs)]
    yield Row(
        metric="clients a second in the median round",  # edgefl starts its workers during the first rounds
        unit="1/s",
        ours=rates[0],
        theirs=rates[1],
        targets=(Target(of="ratio", at_least=4),),
        more_is_better=True,
        **same,
    )
    yield Row(
        metric=f"{ours.rounds} rounds, start included",
        unit="s",
        ours=ours.typical(lambda outcome: outcome.command_s),
        theirs=theirs.typical(lambda outcome: outcome.command_s),
        **same,
    )


def population(*, quick: bool) -> Iterator[Row]:
    """Compare a population of a million with one of a thousand, both in edgefl with the same engine."""
    workload = WORKLOADS["digits-cnn"]

    def side(clients: int) -> Side:
        command = module("ours", workload.name, "--engine", "pool", "--population", str(clients))
        contestant = Contestant(name=f"edgefl, {clients:,} clients", command=command)
        return Side(contestant, workload.quick_rounds if quick else workload.rounds, 1 if quick else REPEATS)

    many, few = side(MILLION), side(1000)
    for _ in range(REPEATS):
        many.turn()
        few.turn()
    many.turn(memory=True)
    few.turn(memory=True)
    more_mb = many.peak_mb - few.peak_mb if many.peak_mb and few.peak_mb else None
    same = {"workload": "1,000,000 clients over 1,000, 100 a round", "skipped": many.skipped or few.skipped}
    detail = {one.name: one.detail() for one in (many, few)}
    yield Row(
        metric="a round",
        unit="s",
        ours=many.typical(lambda outcome: outcome.rest_s),
        rival=few.name,
        theirs=few.typical(lambda outcome: outcome.rest_s),
        targets=(Target(of="ratio", at_least=0.9),),
        detail=detail,
        **same,
    )
    yield Row(metric="more RSS", unit="MB", ours=more_mb, targets=(Target(of="ours", at_most=100),), **same)


def measure(*, quick: bool, only: Sequence[str] = ()) -> Iterator[Row]:
    """Run the given parts, or all."""
    for name, part in parts().items():
        if not only or name in only:
            print(f"-- {name}", file=sys.stderr, flush=True)
            yield from part(quick=quick)


def parts() -> dict[str, Callable[..., Iterator[Row]]]:
    """Return the parts of the benchmark by name."""

    def of(workload: Workload) -> Callable[..., Iterator[Row]]:
        contest = train_mnist if workload.name == "mnist-lr" else train
        return lambda *, quick: contest(workload, quick=quick)

    return {**{name: of(workload) for name, workload in WORKLOADS.items()}, "flower-app": flower_app,
            "population": population}  # fmt: skip


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="One run each, with few rounds.")
@click.option("--json", "json_file", metavar="FILE", help="Write the rows as JSON; - for standard output.")
@click.option("--only", multiple=True, type=click.Choice(list(parts())), help="Only this part; may be repeated.")
@click.option("--readme", type=click.Path(path_type=Path, dir_okay=False), help="Put the table into this file.")
def main(*, quick: bool, json_file: str | None, only: tuple[str, ...], readme: Path | None) -> None:
    signal.signal(signal.SIGTERM, leave)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # also for all child processes
    rows = list(measure(quick=quick, only=only))
    if readme is not None:
        write_readme(rows, readme)
    say(rows, json_file, strict=not quick)


if __name__ == "__main__":
    main()
