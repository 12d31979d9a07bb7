"""`edgefl simulate` of a Flower app: its own ServerApp decides on rounds and strategy, edgefl runs its clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import click

from edgefl.app.commands.request import SimulateRequest
from edgefl.app.commands.run_flower import model_text
from edgefl.errors import ConfigError
from edgefl.flower import FlowerApp, FlowerRunResult, load_flower_app, parse_run_config, run_flower_app
from edgefl.flower.apps.app import RunConfigValue, flatten, fuse_run_config, own_supernodes, parse_value
from edgefl.flower.apps.options import Federation, federation_at_home, read_federation, read_run_config
from edgefl.measure import num_cores
from edgefl.records import RoundReport
from edgefl.simulation.screen.live import Progress, live_rounds
from edgefl.simulation.study.variants import Variant, parse_sweep, variants_of
from edgefl.terminal.output import INTERRUPTED, Output, counted, metrics_text

ROUNDS_KEY = "num-server-rounds"  # by Flower's convention; an app need not have it
ENGINE, REASON = "flower", "a Flower app, its clients run by edgefl"

RunConfig = Mapping[str, RunConfigValue]
OnRound = Callable[[RoundReport], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """How an app is run, independent of its run config."""

    nodes: int | None
    workers: int | None
    node_config: RunConfig

    def run(self, app: FlowerApp, overrides: RunConfig, on_round: OnRound, out: Path | None = None) -> FlowerRunResult:
        return run_flower_app(
            app, self.nodes, overrides, workers=self.workers, node_config=self.node_config, on_round=on_round, out=out
        )


def simulate_flower(request: SimulateRequest, output: Output) -> None:
    """Run the app, show its rounds, and write the result; raises ConfigError for options that it cannot use."""
    if given := request.only_for_tasks():
        raise ConfigError(
            f"{', '.join(given)}: not for a Flower app; set its run-config with --set key=value, "
            "or with --run-config FILE.toml"
        )
    overrides = read_run_config(request.run_config) | parse_run_config(request.settings)
    if request.rounds is not None:
        overrides[ROUNDS_KEY] = request.rounds
    way = _way(request, output)
    app = load_flower_app(request.task)
    if request.sweep:
        _sweep(request, way, overrides, output)
        return
    count = fuse_run_config(app, overrides).get(ROUNDS_KEY)
    with live_rounds(output, Progress(count if isinstance(count, int) else None)) as screen:
        screen.on_engine(ENGINE, f"{REASON}; {counted(way.nodes or app.num_supernodes, 'node')}")
        result = way.run(app, overrides, screen.on_round, request.out)
    _tell(result, request, output)


def _way(request: SimulateRequest, output: Output) -> _Way:
    """Choose by the command line, then by the app, then by Flower's config.toml."""
    said, home = read_federation(request.federation_config), federation_at_home()
    if home.ignored:
        output.line(
            f"Flower's config.toml: {', '.join(home.ignored)} are ignored, because Ray does not run the clients here"
        )
    nodes = request.clients or said.num_supernodes or own_supernodes(request.task) or home.num_supernodes
    limits = replace(home, client_cpus=said.client_cpus or home.client_cpus)
    return _Way(
        nodes=nodes,
        workers=_workers(request.engine, limits),
        node_config={key: parse_value(value) for key, value in request.options().items()},
    )


def _tell(result: FlowerRunResult, request: SimulateRequest, output: Output) -> None:
    said = result.as_json()
    output.line(
        f"{len(result.rounds)} rounds in {result.seconds:.1f} s, {said['clients_per_second']:.0f} clients/s, "
        f"at most {result.peak_rss_mb:.0f} MB: {metrics_text(result.final) or 'no metrics'}"
    )
    if request.out is not None:
        output.line(model_text(result, request.out))
    output.result(said)  # before the plot
    if request.plot is not None:
        from edgefl.simulation.screen.plot import write_plot

        write_plot({result.app: result.rounds}, request.plot, {result.app: result.took_part})
        output.line(f"plot: {request.plot}")
    if request.tensorboard is not None:
        _write_event_file(result, request.tensorboard)
    if result.interrupted:
        output.line(f"interrupted after {len(result.rounds)} rounds")
        raise click.exceptions.Exit(INTERRUPTED)


def _sweep(request: SimulateRequest, way: _Way, overrides: RunConfig, output: Output) -> None:
    """Run the app once per combination of run-config values, loaded again each time, so that no state is shared."""
    from edgefl.app.commands.sweep import tell
    from edgefl.simulation.screen.live import SweepProgress, live_sweep
    from edgefl.simulation.screen.tensorboard import run_folder
    from edgefl.simulation.study.sweep import run_variants

    app = load_flower_app(request.task)
    variants = variants_of(parse_sweep(request.sweep))
    settings = {one.name: {**overrides, **flatten(one.settings, where="--sweep")} for one in variants}
    counts = [fuse_run_config(app, settings[one.name]).get(ROUNDS_KEY) for one in variants]

    def run(variant: Variant, on_round: OnRound) -> FlowerRunResult:
        result = way.run(load_flower_app(request.task), settings[variant.name], on_round)
        if request.tensorboard is not None:
            _write_event_file(result, run_folder(request.tensorboard, variant.name))
        return result

    progress = SweepProgress(variants, [count if isinstance(count, int) else None for count in counts])
    with live_sweep(output, progress) as watching:
        done = run_variants(variants, run, watching)
    tell(done, len(variants), request, output)


def _write_event_file(result: FlowerRunResult, folder: Path) -> None:
    """Write all rounds at once: a strategy's own evaluations are known only at the end."""
    from edgefl.simulation.screen.tensorboard import event_file

    with event_file(folder) as events:
        for outcome in result.rounds:
            events.write(outcome)


def _workers(engine: str, limits: Federation) -> int | None:
    """Return how many processes train; None lets the app's runner decide."""
    limited = limits.workers(num_cores())
    known: dict[str, int | None] = {"auto": limited, "loop": 0, "pool": limited or num_cores()}
    if limits.client_cpus is not None and limited == 0:
        known["pool"] = 1
    if engine not in known:
        raise ConfigError(f"the engine {engine!r} cannot run a Flower app: its training is its own code; use auto")
    return known[engine]
