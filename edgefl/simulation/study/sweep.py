"""`edgefl.sweep`: the same simulation with different settings, one variant after another, compared at the end.

Invariants: an invalid value is refused before the first variant starts; a variant
that fails keeps its finished rounds, and the others continue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgefl.aggregation import refuse_unusable
from edgefl.config import Config, config_of, with_settings
from edgefl.errors import ConfigError, EdgeflError, MissingExtra
from edgefl.guards import STD
from edgefl.records import Counts, RoundReport
from edgefl.rounds import LastEvaluation
from edgefl.simulation.engines.auto import AUTO, ENGINES
from edgefl.simulation.screen.plot import draw_rounds
from edgefl.simulation.simulate import Watching, refuse_more_than_there_are, simulate
from edgefl.simulation.study.report import Json, frame_rows
from edgefl.simulation.study.variants import Variant, variants_of
from edgefl.simulation.world.settings import SimulationConfig, with_arguments
from edgefl.task import Task, load_task
from edgefl.training.metrics import direction
from edgefl.training.samples import require_torch

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

OnRound = Callable[[RoundReport], None]
Simulation = Callable[[SimulationConfig, Watching], "Finished"]  # runs one variant


class Finished(Protocol):
    """The result of a simulation, or of a Flower app's run."""

    @property
    def rounds(self) -> Sequence[RoundReport]: ...
    @property
    def took_part(self) -> Counts: ...
    @property
    def interrupted(self) -> bool: ...
    def as_json(self) -> Json:
        """Return the result with the keys common to all engines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantResult:
    """The result of one variant."""

    variant: Variant
    rounds: Sequence[RoundReport]
    result: Any = None  # a SimulationResult or a FlowerRunResult; None if it failed
    error: str | None = None

    @property
    def last_evaluation(self) -> LastEvaluation:
        """The devices' evaluation of its last parameters; empty for a Flower app and a failed variant."""
        return getattr(self.result, "last_evaluation", LastEvaluation())

    def as_json(self) -> Json:
        """Return the settings and the result; for a failed variant its error and its rounds."""
        said = (
            {"error": self.error, "rounds": [one.as_json() for one in self.rounds]}
            if self.result is None
            else self.result.as_json()
        )
        return {"name": self.variant.name, "settings": dict(self.variant.settings), **said}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """The variants that were run, in order."""

    variants: Sequence[VariantResult]
    interrupted: bool = False  # by Ctrl-C: the last one ended early, others were not started

    @property
    def failed(self) -> Sequence[VariantResult]:
        """Return the variants that raised."""
        return [one for one in self.variants if one.error is not None]

    def as_json(self) -> Json:
        """Return all variants, with the keys common to all engines."""
        variants = [one.as_json() for one in self.variants]
        return {"variants": variants, "best": self.best, "interrupted": self.interrupted}

    @property
    def best(self) -> dict[str, str]:
        """Return the name of the best variant by each metric whose direction is known, if there are several.

        Only variants that ended count, by their last round; the first of equal ones.
        """
        ended = {one.variant.name: last_metrics(one.as_json()) for one in self.variants if one.error is None}
        found = {}
        for name in sorted({name for metrics in ended.values() for name in metrics}):
            higher = None if name.endswith(f"/{STD}") else direction(name, None)  # a spread over devices is no quality
            values = {variant: one[name] for variant, one in ended.items() if math.isfinite(one.get(name, math.nan))}
            if higher is not None and len(values) > 1:
                found[name] = max(values, key=values.__getitem__) if higher else min(values, key=values.__getitem__)
        return found

    def to_frame(self) -> pandas.DataFrame:
        """Return a frame with one row per variant and round, the settings as columns; needs pandas."""
        try:
            import pandas as pd
        except ImportError as cause:
            raise MissingExtra("a frame of the rounds", "sim") from cause
        rows = [{**one.variant.settings, **row} for one in self.variants for row in frame_rows(one.rounds)]
        return pd.DataFrame(rows)

    def figure(self) -> Figure:
        """Draw all variants in the same axes; needs matplotlib."""
        return draw_rounds(self.runs(), self.took_part(), self.finals())

    def runs(self) -> dict[str, Sequence[RoundReport]]:
        """Return each variant's rounds by the variant's name."""
        return {one.variant.name: one.rounds for one in self.variants}

    def finals(self) -> dict[str, Mapping[str, float]]:
        """Return the metrics of each variant's last parameters, by the variant's name."""
        return {one.variant.name: one.result.final for one in self.variants if one.result is not None}

    def took_part(self) -> dict[str, Counts]:
        """Return how often each client took part, by the variant's name."""
        return {one.variant.name: one.result.took_part for one in self.variants if one.result is not None}


def last_metrics(said: Json) -> Json:
    """Return the final metrics of a variant's JSON; for a failed one, those of its last finished round."""
    final: Json | None = said.get("final")
    return final if final is not None else said["rounds"][-1]["metrics"] if said["rounds"] else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepWatching:
    """Callbacks of a running sweep."""

    on_begin: Callable[[Variant], None] = field(default=lambda _variant: None)
    on_engine: Callable[[Variant, str, str], None] = field(default=lambda _variant, _name, _reason: None)
    on_round: Callable[[Variant, RoundReport], None] = field(default=lambda _variant, _outcome: None)
    on_end: Callable[[VariantResult], None] = field(default=lambda _result: None)


def sweep(  # noqa: PLR0913 - as `simulate`
    task: Task | str | Path, over: Mapping[str, Sequence[Any]], *, clients: int | None = None,
    rounds: int | None = None, engine: str = AUTO, config: Config = None,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - as the command's --set
    data: Mapping[str, str] | None = None, evaluate_every: int = 1, watching: SweepWatching | None = None,
    address: str | None = None, simulation: Simulation | None = None,
) -> SweepResult:  # fmt: skip
    """Simulate a task once for every combination: `edgefl.sweep(task, {"train.lr": [0.1, 0.3]}, clients=100)`.

    The other arguments are those of `edgefl.simulate`; `over` overrides them. `simulation` runs a variant
    outside of this process.
    Raises ConfigError, TaskError. A variant that fails is in the result, with its error.
    """
    require_torch("simulation", "sim")
    watching = watching or SweepWatching()
    base = with_arguments(config_of(SimulationConfig, config, set), clients=clients, rounds=rounds, data=data)
    variants = variants_of(over)
    configs = [with_settings(SimulationConfig, base, variant.settings) for variant in variants]
    if engine not in {AUTO, *ENGINES}:
        raise ConfigError(f"engine {engine!r} is not one of: {', '.join([AUTO, *ENGINES])}")
    for one in configs:
        refuse_unusable(one)
    _refuse_unfit(task if isinstance(task, Task) else load_task(str(task)), configs)
    configs_by_name = dict(zip((variant.name for variant in variants), configs, strict=True))

    def run(variant: Variant, on_round: OnRound) -> Finished:
        def on_engine(name: str, reason: str) -> None:
            watching.on_engine(variant, name, reason)

        watching_one = Watching(on_engine=on_engine, on_round=on_round)
        if simulation is not None:
            return simulation(configs_by_name[variant.name], watching_one)
        return simulate(
            task, engine=engine, config=configs_by_name[variant.name], evaluate_every=evaluate_every, address=address,
            watching=watching_one,
        )  # fmt: skip

    return run_variants(variants, run, watching)


def run_variants(
    variants: Sequence[Variant], run: Callable[[Variant, OnRound], Finished], watching: SweepWatching
) -> SweepResult:
    """Run one variant after another; Ctrl-C ends the current one, and starts no other."""
    done: list[VariantResult] = []
    for variant in variants:
        ended, interrupted = _run_one(variant, run, watching)
        done.append(ended)
        watching.on_end(ended)
        if interrupted:
            return SweepResult(variants=done, interrupted=True)
    return SweepResult(variants=done)


def _run_one(
    variant: Variant, run: Callable[[Variant, OnRound], Finished], watching: SweepWatching
) -> tuple[VariantResult, bool]:
    heard: list[RoundReport] = []

    def on_round(outcome: RoundReport) -> None:
        heard.append(outcome)
        watching.on_round(variant, outcome)

    watching.on_begin(variant)
    try:
        result = run(variant, on_round)
    except EdgeflError as error:
        return VariantResult(variant=variant, rounds=heard, error=str(error)), False
    except KeyboardInterrupt:  # a second Ctrl-C ends this variant at once
        return VariantResult(variant=variant, rounds=heard, error="interrupted"), True
    return VariantResult(variant=variant, rounds=result.rounds, result=result), result.interrupted


def _refuse_unfit(task: Task, configs: Sequence[SimulationConfig]) -> None:
    """Raise ConfigError for a cohort that is too large; makes each population once to count its clients."""
    from edgefl.simulation.world.population import make_population

    there: dict[str, int] = {}
    for config in configs:
        key = repr(config.population)
        if key not in there:
            there[key] = len(make_population(task, config.population).names())
        refuse_more_than_there_are(config, there[key])
