"""`edgefl simulate`: many clients on this machine, with the rounds, rules and guards of a deployed fleet."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from edgefl.app.commands.request import SimulateRequest
from edgefl.config import load_config
from edgefl.errors import ConfigError, EdgeflError
from edgefl.flower import is_flower_app
from edgefl.measure import seldom_collected
from edgefl.operator.connection import CloudConnection, connected
from edgefl.records import RoundReport
from edgefl.simulation.screen.live import Progress, live_rounds
from edgefl.terminal.output import INTERRUPTED, Output, example, json_option, metrics_text

if TYPE_CHECKING:
    from edgefl.operator.client import Json
    from edgefl.simulation.study.report import SimulationResult
    from edgefl.task import Task

    Publish = Callable[[SimulationResult], Json]

ENGINES = ("auto", "loop", "stacked", "pool", "ray")
_FILE, _FOLDER = click.Path(path_type=Path, dir_okay=False), click.Path(path_type=Path, file_okay=False)


@click.command(
    epilog=example(
        "edgefl simulate examples/digits --clients 1000 --rounds 20 --plot out.png --json out.json",
        "edgefl simulate examples/digits --config examples/digits/config.toml --set rounds.clients=100 --engine pool",
        "edgefl simulate examples/digits --clients 100 --sweep train.lr=0.03,0.1,0.3 --plot out.png",
        "edgefl simulate examples/digits --clients 5 --config examples/digits/config.toml --publish digits",
    )
)
@click.argument("task")
@click.option("--clients", type=click.IntRange(min=1), help="Short for --set population.clients=N.")
@click.option("--rounds", type=click.IntRange(min=1), help="Short for --set rounds.count=N.")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="auto finds the fastest.")
@click.option("--address", metavar="HOST:PORT|auto", help="Ray cluster for --engine ray; without it, one is started.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file.")
@click.option("--set", "settings", multiple=True, metavar="A.B=C", help="One setting; overrides the file.")
@click.option("--run-config", multiple=True, metavar="'K=V K=V'|FILE", help="As --set, in Flower's syntax.")
@click.option("--federation-config", multiple=True, metavar="'K=V K=V'", help="For a Flower app: num-supernodes=N, ..")
@click.option("--sweep", multiple=True, metavar="A.B=C,D,..", help="Run once per value (of several: per combination).")
@click.option("--data", multiple=True, metavar="K=V", help="Data option for every client's loader, or node config.")
@click.option("--evaluate-every", type=click.IntRange(min=1), default=1, show_default=True, metavar="ROUNDS",
              help="On the test data; for clients: --set rounds.evaluate_every=N.")  # fmt: skip
@click.option("--out", type=_FILE, help="File for the model (safetensors).")
@click.option("--publish", metavar="NAME", help="Publish the model, as `edgefl models publish` does.")
@click.option("--plot", type=_FILE, help="Plot the rounds into a .png or .svg.")
@click.option("--tensorboard", type=_FOLDER, metavar="DIR", help="Write event files for TensorBoard.")
@click.option("--checkpoint", type=_FOLDER, metavar="DIR", help="Save the state here, to continue from it.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), default=1, show_default=True, metavar="ROUNDS")
@click.option(
    "--resume",
    type=_FOLDER,
    metavar="DIR",
    help="Continue from a --checkpoint with its settings, and save the state there.",
)
@connected
@json_option
def simulate(*, connection: CloudConnection, output: Output, **flags: Any) -> None:
    """Simulate TASK: package.module:attribute, or a folder whose pyproject.toml names its task.

    A folder with [tool.flwr.app] is a Flower app and runs unmodified; --set and --sweep change its run-config. Its
    number of nodes is set by --clients, --federation-config, its pyproject.toml or Flower's config.toml, else 2.
    Ctrl-C ends the round and keeps the results so far.
    """
    request = SimulateRequest(**flags)
    if connection.is_chosen and request.publish is None:
        raise ConfigError("--cloud and --credentials say where to --publish NAME: name the model, or leave them out")
    with seldom_collected():
        if is_flower_app(request.task):
            from edgefl.app.commands.simulate_flower import simulate_flower

            simulate_flower(request, output)
            return
        request.refuse_flowers()
        if request.sweep:
            from edgefl.app.commands.sweep import sweep_task

            sweep_task(request, output)
        else:
            publish = None if request.publish is None else _publisher(request, connection, output)
            _simulate_task(request, output, publish)


def _simulate_task(request: SimulateRequest, output: Output, publish: Publish | None) -> None:
    from edgefl.simulation.isolation.process import OwnProcess

    with OwnProcess(to_stderr=output.json_alone) as process, ExitStack() as stack:
        from edgefl.aggregation import rule_kind
        from edgefl.simulation.isolation.messages import Order
        from edgefl.simulation.simulate import Watching
        from edgefl.simulation.study.checkpoint import read_settings
        from edgefl.simulation.study.report import CutShort, ProcessLost
        from edgefl.simulation.world.settings import SimulationConfig

        before = read_settings(request.resume) if request.resume is not None and request.config is None else None
        job = load_config(SimulationConfig, request.config, request.over(), base=before)
        rule_kind(job.aggregation.rule)
        screen = stack.enter_context(live_rounds(output, Progress(job.rounds.count)))
        callbacks = [screen.on_round]
        if request.tensorboard is not None:
            from edgefl.simulation.screen.tensorboard import event_file

            events = stack.enter_context(event_file(request.tensorboard))
            callbacks.append(events.write)

        def on_round(outcome: RoundReport) -> None:
            for callback in callbacks:
                callback(outcome)

        order = Order(
            task=request.task, engine=request.engine, config=job, data=request.options(),
            evaluate_every=request.evaluate_every, checkpoint=request.checkpoint,
            checkpoint_every=request.checkpoint_every, resume=request.resume, address=request.address,
        )  # fmt: skip
        try:
            result = process.simulate(order, Watching(on_engine=screen.on_engine, on_round=on_round), request.out)
            if request.tensorboard is not None:
                events.write_last(result.last_evaluation.metrics)
        except (CutShort, ProcessLost) as error:
            stack.close()
            if error.so_far is not None and error.so_far.rounds:
                _tell(error.so_far, request, output)
            raise
    if result.interrupted:
        _tell(result, request, output)
        output.line(f"interrupted after {len(result.rounds)} of {job.rounds.count} rounds")
        raise click.exceptions.Exit(INTERRUPTED)
    _tell(result, request, output, publish)


def _publisher(request: SimulateRequest, connection: CloudConnection, output: Output) -> Publish:
    """Return what publishes the result; refuses before the work what can be refused."""
    from edgefl.operator.publish import refuse_unexportable, refuse_unreachable
    from edgefl.task import load_task

    task = load_task(request.task)
    refuse_unexportable(task)
    with connection.open() as client:
        refuse_unreachable(client)

    def publish(result: SimulationResult) -> Json:
        try:
            return _published(task, str(request.publish), result, connection, output)
        except EdgeflError:
            from edgefl.simulation.study.report import model_of

            kept = request.out or _unused(f"{request.publish}.safetensors")
            model_of(result.parameters, kept)
            again = ["edgefl", "models", "publish", str(request.publish), "--task", request.task]
            output.line(f"not published; the model is kept: {shlex.join([*again, '--parameters', str(kept)])}")
            raise

    return publish


def _published(
    task: Task, name: str, result: SimulationResult, connection: CloudConnection, output: Output
) -> Json:  # fmt: skip
    """Publish as `edgefl models publish --parameters` does."""
    from edgefl.app.commands.models import say_published
    from edgefl.operator import publish as publishing
    from edgefl.simulation.study.report import model_of

    with connection.open() as client, TemporaryDirectory(prefix="edgefl-publish-") as made:
        parameters = Path(made, "parameters.safetensors")
        model_of(result.parameters, parameters)
        exported = publishing.export(
            task, parameters, Path(made), compression=publishing.AUTO, max_drop=publishing.MAX_DROP
        )
        release = publishing.publish(client, name, exported)
    say_published(release, output)
    return {"release": release}


def _unused(name: str) -> Path:
    path, number = Path(name), 1
    while path.exists():
        path, number = Path(f"{number}-{name}"), number + 1
    return path


def _tell(
    result: SimulationResult, request: SimulateRequest, output: Output, publish: Publish | None = None
) -> None:  # fmt: skip
    output.line(
        f"{len(result.rounds)} rounds in {result.seconds:.1f} s, {result.clients_per_second:.0f} clients/s, "
        f"at most {result.peak_rss_mb:.0f} MB: {metrics_text(result.final) or 'no metrics'}"
    )
    if result.stopped:
        output.line(f"stopped early: {result.stopped}")
    if result.last_evaluation.fault:
        output.line(result.last_evaluation.fault)
    if request.plot is not None:
        from edgefl.simulation.screen.plot import write_plot

        write_plot(
            {result.task: result.rounds}, request.plot, {result.task: result.took_part}, {result.task: result.final}
        )
        output.line(f"plot: {request.plot}")
    released: Json = {}
    try:
        released = {} if publish is None else publish(result)
    finally:  # a model that is not published is trained all the same
        output.result(result.as_json() | released)
