"""`edgefl simulate`: many clients on this machine, with the rounds, rules and guards of a deployed fleet."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import click

from edgefl.config import load_config
from edgefl.errors import ConfigError
from edgefl.flower import is_flower_app
from edgefl.operator.output import Output, example, json_option, metrics_text, refuse_no_folder
from edgefl.operator.progress import INTERRUPTED
from edgefl.simulation.cli_flower import FlowerRequest, simulate_flower
from edgefl.simulation.live import Progress, live_rounds

ENGINES = ("auto", "loop", "stacked", "pool")


@click.command(
    epilog=example(
        "edgefl simulate examples/digits --clients 1000 --rounds 20 --plot out.png --json out.json",
        "edgefl simulate examples/digits --config examples/digits/config.toml --set rounds.clients=100 --engine pool",
    )
)
@click.argument("task")
@click.option("--clients", type=click.IntRange(min=1), help="Short for --set population.clients=N.")
@click.option("--rounds", type=click.IntRange(min=1), help="Short for --set rounds.count=N.")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="auto measures.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file.")
@click.option("--set", "settings", multiple=True, metavar="A.B=C", help="One setting, over the file.")
@click.option("--data", multiple=True, metavar="K=V", help="A data option for every client's loader.")
@click.option("--evaluate-every", type=click.IntRange(min=1), default=1, show_default=True, metavar="ROUNDS")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where the model goes (safetensors).")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the rounds into a .png or .svg.")
@json_option
def simulate(  # noqa: PLR0913 - one a flag
    *, task: str, clients: int | None, rounds: int | None, engine: str, config: Path | None,
    settings: tuple[str, ...], data: tuple[str, ...], evaluate_every: int, out: Path | None, plot: Path | None,
    output: Output,
) -> None:  # fmt: skip
    """Simulate TASK: package.module:attribute, or a folder whose pyproject.toml names its task.

    A folder with [tool.flwr.app] is a Flower app and runs as it is; --set key=value is for its run-config.
    Ctrl-C ends the round and keeps what there is.
    """
    from edgefl.simulation.settings import SimulationConfig
    from edgefl.simulation.simulate import Watching
    from edgefl.simulation.simulate import simulate as run_simulation

    refuse_no_folder(out, "--out")
    refuse_no_folder(plot, "--plot")
    if plot is not None:
        from edgefl.simulation.plot import require_matplotlib

        require_matplotlib()
    if is_flower_app(task):
        flags = {"--config": config, "--data": data, "--evaluate-every": evaluate_every > 1, "--out": out}
        request = FlowerRequest(
            folder=Path(task), clients=clients, rounds=rounds, engine=engine, settings=settings, plot=plot,
            task_flags=flags,
        )  # fmt: skip
        simulate_flower(request, output)
        return
    over = (*settings, *([f"rounds.count={rounds}"] if rounds is not None else []))
    job = load_config(SimulationConfig, config, over)
    with ExitStack() as stack:
        progress = Progress(job.rounds.count)
        on_round = stack.enter_context(live_rounds(output, progress))

        def on_engine(name: str, reason: str) -> None:
            output.line(f"engine {name}: {reason}")
            progress.begin(name, now_s=time.perf_counter())

        result = run_simulation(
            task, clients=clients, engine=engine, config=job, data=_options(data), evaluate_every=evaluate_every,
            out=out, watching=Watching(on_engine=on_engine, on_round=on_round),
        )  # fmt: skip
    output.line(
        f"{len(result.rounds)} rounds in {result.seconds:.1f} s, {result.clients_per_second:.0f} clients/s, "
        f"at most {result.peak_rss_mb:.0f} MB: {metrics_text(result.final) or 'no metrics'}"
    )
    if plot is not None:
        from edgefl.simulation.plot import write_plot

        write_plot({result.task: result.rounds}, plot, {result.task: result.took_part})
        output.line(f"plot: {plot}")
    output.result(result.as_json())
    if result.interrupted:
        output.line(f"interrupted after {len(result.rounds)} of {job.rounds.count} rounds")
        raise click.exceptions.Exit(INTERRUPTED)


def _options(pairs: tuple[str, ...]) -> dict[str, str]:
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--data {pair!r} is not of the form key=value")
        options[key] = value
    return options
