"""`python -m edgefl.faults`: runs seeds, shows what they did, and for one that fails the few faults that it takes."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import click

from edgefl.faults import mutants
from edgefl.faults.fleet import TOPOLOGIES
from edgefl.faults.plan import Fault, draw
from edgefl.faults.run import Simulator, Verdict
from edgefl.faults.shrink import shrunk

PART = 50  # seeds per task of a process
MAX_SHRUNK = 5  # seeds


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=100, show_default=True, help="How many seeds to run.")
@click.option("--from", "first", type=click.IntRange(0), default=0, show_default=True, help="The first seed.")
@click.option("--seed", type=click.IntRange(0), help="Run this seed alone.")
@click.option("--trace", is_flag=True, help="Print all that happened.")
@click.option("--topology", "topologies", multiple=True, type=click.Choice(list(TOPOLOGIES)), help="[default: all]")
@click.option(
    "--mutant", type=click.Choice(list(mutants.MUTANTS)), default=None, help="Run with this fault in the code."
)
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="How many run seeds at a time.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
def main(  # noqa: PLR0913 - the options
    *, seeds: int, first: int, seed: int | None, trace: bool, topologies: Sequence[str], mutant: str | None,
    processes: int, json_file: Path | None,
) -> None:  # fmt: skip
    """Run a fleet under faults, one simulation per seed; exits with 1 if a seed fails."""
    chosen = tuple(topologies) or tuple(TOPOLOGIES)
    numbers = [seed] if seed is not None else list(range(first, first + seeds))
    verdicts = run_seeds(numbers, chosen, mutant or "", processes)
    total, failing = Total(time.monotonic()), list[Verdict]()
    for verdict in verdicts:
        total.add(verdict)
        if trace:
            click.echo("\n".join(verdict.trace))
        if verdict.wrong:
            _tell(verdict, chosen, mutant or "")
            failing.append(verdict)
        if total.num_seeds % PART == 0:
            click.echo(total.line(len(numbers)))
    for verdict in failing[:MAX_SHRUNK]:  # after the others: one simulator at a time in a process
        _tell_least(verdict, chosen, mutant or "")
    click.echo(total.table())
    if json_file is not None:
        json_file.write_text(json.dumps(total.as_json(), indent=2), encoding="utf-8")
    if total.failed:
        raise SystemExit(1)


def run_seeds(seeds: Sequence[int], topologies: Sequence[str], mutant: str, processes: int = 1) -> Iterator[Verdict]:
    """Yield the verdict of each seed; with several processes in the order in which they are done."""
    if processes == 1:
        yield from _run_part(seeds, topologies, mutant)
        return
    parts = [seeds[start : start + PART] for start in range(0, len(seeds), PART)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_verdicts, part, topologies, mutant) for part in parts]
        for done in as_completed(running):
            yield from done.result()


def _verdicts(seeds: Sequence[int], topologies: Sequence[str], mutant: str) -> list[Verdict]:
    return list(_run_part(seeds, topologies, mutant))


def _run_part(seeds: Iterable[int], topologies: Sequence[str], mutant: str) -> Iterator[Verdict]:
    with mutants.installed(mutant), Simulator(topologies) as simulator:
        for seed in seeds:
            yield simulator.run(draw(seed, topologies))


def shrink(verdict: Verdict, topologies: Sequence[str], mutant: str = "") -> list[Fault]:
    """Return the faults of a failing seed without which it does not fail."""
    settings = verdict.settings
    with mutants.installed(mutant), Simulator(topologies) as simulator:
        return shrunk(settings.faults, lambda faults: bool(simulator.run(settings.without(faults)).wrong))


def _tell(verdict: Verdict, topologies: Sequence[str], mutant: str) -> None:
    """Say what is wrong with a seed, and how to replay it."""
    options = "".join(f" --topology {one!r}" for one in topologies if tuple(topologies) != tuple(TOPOLOGIES))
    options += f" --mutant {mutant}" if mutant else ""
    seed = verdict.settings.seed
    click.echo(f"seed {seed} fails; replay it with: python -m edgefl.faults --seed {seed} --trace{options}")
    for one in verdict.wrong:
        click.echo(f"  {one}")


def _tell_least(verdict: Verdict, topologies: Sequence[str], mutant: str) -> None:
    """Say which of its faults a seed takes to fail."""
    left = shrink(verdict, topologies, mutant)
    num_faults = len(verdict.settings.faults)
    click.echo(f"seed {verdict.settings.seed} takes {len(left)} of its {num_faults} faults to fail:")
    for fault in left:
        click.echo(f"    {fault.at_s:7.3f} s  {fault.kind} {fault.node} {fault.other} {fault.for_s:g} {fault.number}")


class Total:
    """What many seeds did together."""

    def __init__(self, begun_s: float) -> None:
        self._begun_s = begun_s
        self.num_seeds = self.num_rounds = self.num_trained = self.num_messages = self.num_steps = 0
        self.virtual_s = 0.0
        self.faults: Counter[str] = Counter()
        self.failed: dict[int, list[str]] = {}

    def add(self, verdict: Verdict) -> None:
        """Count one seed."""
        self.num_seeds += 1
        self.num_rounds += verdict.settings.rounds
        self.num_trained += verdict.num_trained
        self.num_messages += verdict.num_messages
        self.num_steps += verdict.num_steps
        self.virtual_s += verdict.virtual_s
        self.faults += verdict.faults
        if verdict.wrong:
            self.failed[verdict.settings.seed] = list(verdict.wrong)

    def line(self, wanted: int) -> str:
        """Return the progress."""
        seconds = time.monotonic() - self._begun_s
        return f"{self.num_seeds} of {wanted} seeds, {len(self.failed)} failed, {seconds:.0f} s"

    def as_json(self) -> dict[str, object]:
        """Return it as JSON data."""
        return {
            "seeds": self.num_seeds, "failed": {str(seed): why for seed, why in self.failed.items()},
            "faults": dict(sorted(self.faults.items())), "rounds": self.num_rounds, "updates": self.num_trained,
            "messages": self.num_messages, "steps": self.num_steps, "virtual_s": round(self.virtual_s, 3),
        }  # fmt: skip

    def table(self) -> str:
        """Return all numbers, one per line."""
        rows = [
            ("seeds", self.num_seeds), ("seeds that fail", len(self.failed)), ("rounds", self.num_rounds),
            ("updates trained", self.num_trained), ("messages", self.num_messages), ("steps", self.num_steps),
            ("virtual hours", round(self.virtual_s / 3600, 1)),
            *((f"fault: {kind}", count) for kind, count in sorted(self.faults.items())),
        ]  # fmt: skip
        return "\n".join(f"{name:<28}{value:>12}" for name, value in rows)
