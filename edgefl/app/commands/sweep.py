"""`edgefl simulate --sweep`: variants one after another; a live table, one plot, one JSON, a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefl.app.commands.request import SimulateRequest
from edgefl.config import load_config, with_settings
from edgefl.records import RoundReport
from edgefl.simulation.isolation.messages import Order
from edgefl.simulation.isolation.process import OwnProcess
from edgefl.simulation.screen.live import SweepProgress, compare, live_sweep
from edgefl.simulation.simulate import Watching
from edgefl.simulation.study.report import SimulationResult
from edgefl.simulation.study.sweep import SweepResult, SweepWatching, VariantResult, sweep
from edgefl.simulation.study.variants import Variant, parse_sweep, variants_of
from edgefl.simulation.world.settings import SimulationConfig
from edgefl.terminal.output import INTERRUPTED, Output, counted

if TYPE_CHECKING:
    from edgefl.simulation.screen.tensorboard import EventFile

FAILED = 1


def sweep_task(request: SimulateRequest, output: Output) -> None:
    """Run a task's variants; exits with 1 if one failed, 130 after Ctrl-C."""
    base = load_config(SimulationConfig, request.config, request.over())
    over, options = parse_sweep(request.sweep), request.options()
    variants = variants_of(over)
    counts = [with_settings(SimulationConfig, base, variant.settings).rounds.count for variant in variants]
    with (
        OwnProcess(to_stderr=output.json_alone) as process,
        watched(request, output, SweepProgress(variants, counts)) as watching,
    ):

        def simulation(config: SimulationConfig, watching: Watching) -> SimulationResult:
            order = Order(
                task=request.task, engine=request.engine, config=config, evaluate_every=request.evaluate_every,
                address=request.address,
            )  # fmt: skip
            return process.simulate(order, watching)

        result = sweep(request.task, over, engine=request.engine, config=base, data=options, watching=watching,
                       simulation=simulation)  # fmt: skip
    tell(result, len(variants), request, output)


def tell(result: SweepResult, wanted: int, request: SimulateRequest, output: Output) -> None:
    """Print the comparison, write plot and JSON, and exit with the status of the variants."""
    compare(result, output)
    if request.plot is not None:
        from edgefl.simulation.screen.plot import write_plot

        write_plot(result.runs(), request.plot, result.took_part(), result.finals())
        output.line(f"plot: {request.plot}")
    output.result(result.as_json())
    if result.interrupted:
        output.line(f"interrupted in variant {len(result.variants)} of {wanted}")
        raise click.exceptions.Exit(INTERRUPTED)
    if result.failed:
        output.line(f"{counted(len(result.failed), 'variant')} of {wanted} failed")
        raise click.exceptions.Exit(FAILED)


@contextmanager
def watched(request: SimulateRequest, output: Output, progress: SweepProgress) -> Iterator[SweepWatching]:
    """Yield the callbacks of a sweep: for the screen, and for TensorBoard if requested."""
    with live_sweep(output, progress) as live, ExitStack() as open_file:
        if request.tensorboard is None:
            yield live
            return
        yield _with_event_files(live, request.tensorboard, open_file)


def _with_event_files(live: SweepWatching, folder: Path, open_file: ExitStack) -> SweepWatching:
    """Also write each variant's rounds into its own folder."""
    from edgefl.simulation.screen.tensorboard import event_file, run_folder

    writing: list[EventFile] = []

    def begin(variant: Variant) -> None:
        open_file.close()
        writing[:] = [open_file.enter_context(event_file(run_folder(folder, variant.name)))]
        live.on_begin(variant)

    def on_round(variant: Variant, outcome: RoundReport) -> None:
        writing[0].write(outcome)
        live.on_round(variant, outcome)

    def on_end(ended: VariantResult) -> None:
        if ended.result is not None:
            writing[0].write_last(ended.last_evaluation.metrics)
        live.on_end(ended)

    return dataclasses.replace(live, on_begin=begin, on_round=on_round, on_end=on_end)
