"""`edgefl run`: a task, or a Flower app, on the fleet."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefl.app.commands.progress import left_running, patience, round_progress
from edgefl.app.commands.run_flower import FlowerRun, run_flower
from edgefl.config import JobConfig, load_config
from edgefl.errors import ConfigError
from edgefl.flower import is_flower_app
from edgefl.operator.connection import CloudConnection, connected
from edgefl.protocols.labels import check_label
from edgefl.terminal.output import Output, counted, example, json_option, metrics_text, refuse_no_folder

if TYPE_CHECKING:
    from edgefl.operator.run import RunResult
    from edgefl.task import Task


@click.command(
    epilog=example(
        "edgefl run examples/digits --config examples/digits/config.toml --set rounds.count=5 --out digits.safetensors"
    )
)
@click.argument("task", required=False)
@connected
@click.option("--name", help="A name for the job, for `edgefl jobs`.")
@click.option("--resume", metavar="JOB", help="Continue from a kept round of this job, as a new job.")
@click.option("--round", "round_number", type=click.IntRange(min=1), help="With --resume: the round. [default: last]")
@click.option("--priority", type=int, help="Short for --set rounds.priority=N: jobs of a higher one get devices first.")
@click.option(
    "--local", type=click.IntRange(1, 32), metavar="N", help="Start N devices on this machine (edgefl local)."
)
@click.option("--rounds", type=click.IntRange(min=1), help="Short for --set rounds.count=N.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file.")
@click.option("--set", "settings", multiple=True, metavar="A.B=C", help="One setting; overrides the file.")
@click.option("--run-config", multiple=True, metavar="'K=V K=V'|FILE", help="As --set, in Flower's syntax.")
@click.option("--federation-config", multiple=True, hidden=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File for the model (safetensors).")
@json_option
def run(  # noqa: PLR0913 - one a flag
    *, task: str | None, connection: CloudConnection, name: str | None, resume: str | None, round_number: int | None,
    priority: int | None, local: int | None, rounds: int | None, config: Path | None, settings: tuple[str, ...],
    run_config: tuple[str, ...], federation_config: tuple[str, ...], out: Path | None, output: Output,
) -> None:  # fmt: skip
    """Train a task on the fleet.

    TASK is package.module:attribute, or a folder whose pyproject.toml names its task. Ctrl-C stops watching, not the
    job: `edgefl jobs watch` follows it again, `edgefl jobs cancel` ends it. A folder with [tool.flwr.app] is a Flower
    app and runs unmodified: its ServerApp here, so that Ctrl-C ends the run, its ClientApp on the devices;
    --set key=value changes its run-config.

    With --resume, a new job continues from a kept round of JOB, with its settings unless others are given; rounds are
    numbered on. TASK is then optional: it evaluates the models here, and its code replaces the job's.
    """
    with left_running(output) as standing:  # from here on: what is imported next takes seconds
        from edgefl.aggregation import rule_kind
        from edgefl.operator.run import WatchCallbacks, continue_from, submit, watch
        from edgefl.task import load_task

        refuse_no_folder(out, "--out")
        check_label(name)
        if local is not None:
            connection = _local_fleet(local, connection, output)
        _refuse_unfit(task, resume, round_number, priority)
        if task is not None and is_flower_app(task):
            asked = FlowerRun(
                folder=Path(task), rounds=rounds, settings=settings, run_config=run_config, out=out,
                federation_config=federation_config, label=name, task_flags={"--config": config},
            )  # fmt: skip
            run_flower(asked, connection, output)
            return
        if run_config or federation_config:
            raise ConfigError("--run-config is for Flower apps; configure a task with --set a.b=c or --config FILE")
        over = _overriding(settings, {"rounds.count": rounds, "rounds.priority": priority})
        job_config = load_config(JobConfig, config, over)  # what can be refused is refused before the task is loaded
        rule_kind(job_config.aggregation.rule)
        loaded = None if task is None else load_task(task)
        with connection.open() as client:
            before = None if resume is None else client.job(client.find_job(resume))
            if before is not None:
                job_config = load_config(JobConfig, config, over, base=before.get("config"))
            if before is not None:
                job = standing.job = continue_from(
                    client, before["id"], job_config, patience(output.line), round_number=round_number, label=name,
                    reference=task, task=loaded, on_ask=standing.ask, on_note=output.line,
                )  # fmt: skip
                after = round_number or before["rounds_done"]
                output.line(f"job {job} continues {before['id']} after round {after} of {job_config.rounds.count}")
            elif task is not None and loaded is not None:
                job = standing.job = submit(
                    client, task, loaded, job_config, patience(output.line), label=name, on_ask=standing.ask,
                    on_note=output.line,
                )  # fmt: skip
                output.line(f"job {job} started: {counted(job_config.rounds.count, 'round')}")
            with round_progress(output, job_config.rounds.count) as screen:
                callbacks = WatchCallbacks(
                    on_round=screen.on_round, on_waiting=partial(screen.tell_waiting, job), on_note=screen.line
                )
                result = watch(client, job, loaded, callbacks, out=out, patience=patience(screen.line))
    _tell_end(output, job, result, out)
    if _is_publishable(loaded):
        output.line(f"publish it: edgefl models publish NAME --task {task} --job {job}")
    output.result(result.as_json())


def _tell_end(output: Output, job: str, result: RunResult, out: Path | None) -> None:
    """Say how a job ended."""
    output.line(f"job {job} done in {result.seconds:.1f} s: {metrics_text(result.final) or 'no metrics'}")
    if result.stopped:
        output.line(f"stopped early: {result.stopped}")
    if result.last_evaluation.fault:
        output.line(result.last_evaluation.fault)
    if out is not None:
        output.line(f"model: {out}")


def _overriding(settings: tuple[str, ...], short: Mapping[str, int | None]) -> list[str]:
    """Return the settings, with those of the options that are short for one."""
    return [*settings, *(f"{key}={value}" for key, value in short.items() if value is not None)]


def _is_publishable(task: Task | None) -> bool:
    """Whether `models publish` can export the task's model."""
    return task is not None and (task.model is not None or task.export is not None)


def _refuse_unfit(task: str | None, resume: str | None, round_number: int | None, priority: int | None) -> None:
    """Raise ConfigError for arguments that do not go together."""
    if task is None and resume is None:
        raise ConfigError("name a TASK, or a job to continue: --resume JOB")
    if round_number is not None and resume is None:
        raise ConfigError("--round is a round of the job that --resume names; drop it, or add --resume JOB")
    if task is not None and is_flower_app(task) and (resume is not None or priority is not None):
        raise ConfigError("--resume and --priority are for tasks; a Flower app's rounds are its ServerApp's")


def _local_fleet(devices: int, connection: CloudConnection, output: Output) -> CloudConnection:
    """Start the local fleet, unless it runs; return the connection to it."""
    if connection.cloud is not None or connection.credentials is not None:
        raise ConfigError("--local is a fleet of its own on this machine; drop --cloud and --credentials, or --local")
    from edgefl.app.local.holder import start
    from edgefl.operator.credentials import local_home

    output.line(f"local fleet of {counted(devices, 'device')}: it runs until `edgefl local stop`")
    return CloudConnection(None, Path(start(local_home(), devices).credentials))
