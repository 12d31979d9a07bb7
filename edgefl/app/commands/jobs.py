"""`edgefl jobs`: list, show, compare, draw, follow, pause, resume and cancel the trainings of a fleet."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from edgefl.app.commands.devices import TREE_PLOT, show_tree
from edgefl.app.commands.job_text import ended_text, print_comparison, print_job, progress_text
from edgefl.app.commands.log_text import LINES, print_log
from edgefl.app.commands.progress import left_running, patience, round_progress
from edgefl.errors import ConfigError
from edgefl.operator.client import CloudClient, Json
from edgefl.operator.connection import CloudConnection, connected
from edgefl.operator.follow import follow_log
from edgefl.operator.history import compared, curves_of, headline, reasons_of
from edgefl.operator.tree import add_job, fleet_tree
from edgefl.process.log_tail import MAX_RECORDS
from edgefl.records import RoundReport
from edgefl.rounds import LastEvaluation
from edgefl.terminal.output import (
    INTERRUPTED,
    Output,
    ago_text,
    example,
    json_option,
    metrics_text,
    refuse_no_folder,
    time_text,
)


@click.group()
def jobs() -> None:
    """Federated trainings, running and ended.

    JOB is a job's id, the beginning of its id, or its name (`edgefl run --name`).
    """


@jobs.command("list", epilog=example("edgefl jobs list"))
@connected
@json_option
def list_jobs(connection: CloudConnection, output: Output) -> None:
    """List every job, the newest first, with a metric of its last round."""
    with connection.open() as client:
        found = client.jobs()
    when = _ago if sys.stdout.isatty() else time_text
    rows = [
        (one["id"], one.get("label"), one["name"], one["state"], progress_text(one), _metric(one),
         when(one["created_s"]), one.get("waiting"), one["error"])
        for one in found
    ]  # fmt: skip
    columns = ("id", "name", "task", "state", "rounds", "metric", "started", "waits", "error")
    spare = ("error", "task", *(["waits"] if not any(one.get("waiting") for one in found) else []))
    output.table(columns, rows, "no job yet; `edgefl run` starts one", whole=("id",), spare=spare)
    output.result(found)


@jobs.command(epilog=example("edgefl jobs show job-1a2b3c4d", "edgefl jobs show 'first try' --json -"))
@click.argument("job")
@click.option("--devices", "with_devices", is_flag=True, help="Show which devices the latest round asked, and why not "
                                                              "the others.")  # fmt: skip
@click.option(
    "--tree",
    "with_tree",
    is_flag=True,
    help="Also show the fleet as a tree: who took part, and what each region's rounds took.",
)
@TREE_PLOT
@connected
@json_option
def show(
    *, job: str, with_devices: bool, with_tree: bool, path: Path | None, connection: CloudConnection, output: Output
) -> None:
    """Show a job's settings, the curve of each metric, and why answers were refused.

    The JSON has every round, with all metrics, and `curves` and `refusals`; with --devices also `devices`, with --tree
    also `tree`.
    """
    if path is not None and not with_tree:
        raise ConfigError("--plot draws the tree: give --tree, too. `edgefl jobs plot` draws the rounds")
    with connection.open() as client:
        found = client.job(client.find_job(job))
        if with_devices:
            found |= {"devices": client.job_devices(found["id"])}
        root = fleet_tree(client.regions(), client.devices()) if with_tree else None
    print_job(found, output)
    curves = {curve.name: curve.as_json() for curve in curves_of(found)}
    more = {}
    if root is not None:
        add_job(root, found)
        output.line("")
        show_tree(root, path, output)
        more = {"tree": root.as_json()}
    output.result(found | {"curves": curves, "refusals": reasons_of(found)} | more)


@jobs.command(epilog=example("edgefl jobs compare job-1a2b3c4d 'first try'"))
@click.argument("first", metavar="JOB")
@click.argument("others", metavar="JOB...", nargs=-1, required=True)
@connected
@json_option
def compare(first: str, others: Sequence[str], connection: CloudConnection, output: Output) -> None:
    """Compare jobs: the settings that differ, and the metrics side by side."""
    with connection.open() as client:
        result = compared(_found(client, (first, *others)))
    print_comparison(result, output)
    output.result(result)


@jobs.command(epilog=example("edgefl jobs plot job-1a2b3c4d -o job.png"))
@click.argument("names", metavar="JOB...", nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False),
              help="File for the image: png, svg, pdf, ... [default: ID.png of the first job]")  # fmt: skip
@connected
@json_option
def plot(names: Sequence[str], out: Path | None, connection: CloudConnection, output: Output) -> None:
    """Draw the rounds of one job, or of several in the same axes, as `edgefl simulate --plot` does."""
    from edgefl.simulation.screen.plot import refuse_unknown_format, require_matplotlib, write_plot

    require_matplotlib()
    if out is not None:
        refuse_no_folder(out, "--out")
        refuse_unknown_format(out, "--out")
    with connection.open() as client:
        found = _found(client, names)
    runs, finals = {}, {}
    for one in found:
        rounds = tuple(RoundReport.from_json(outcome) for outcome in one.get("rounds", ()))
        if not rounds:
            raise ConfigError(f"{one['id']} has no rounds to draw{_why_none(one)}")
        name = str(one["id"] if not one.get("label") else f"{one['label']} ({one['id']})")
        runs[name], finals[name] = rounds, LastEvaluation.from_json(one.get("last_evaluation") or {}).metrics
    path = out or Path(f"{found[0]['id']}.png")
    refuse_no_folder(path, "--out")
    write_plot(runs, path, finals=finals)
    output.line(f"plot: {path}")
    output.result({"jobs": [one["id"] for one in found], "plot": str(path)})


@jobs.command(
    epilog=example(
        "edgefl jobs logs job-1a2b3c4d",
        "edgefl jobs logs 'first try' --follow",
        "edgefl jobs logs 'first try' --device cam-3",
    )
)
@click.argument("job")
@click.option("--device", help="What this device's own log says of the job, instead of the cloud's.")
@LINES
@click.option("--follow", is_flag=True, help="Then show what is new, until the job ends or Ctrl-C.")
@connected
@json_option
def logs(
    *, job: str, device: str | None, num_lines: int, follow: bool, connection: CloudConnection, output: Output
) -> None:  # fmt: skip
    """Show the end of what the cloud's log says of a job, or a device's log; at most 256 kB."""
    if follow and device is not None:
        raise ConfigError(
            "--follow follows the cloud's log; a device sends the end of its own log each time that it is asked. Leave "
            "out --device or --follow"
        )
    with connection.open() as client:
        job = client.find_job(job)
        if follow:
            _follow_log(client, job, num_lines, output)
            return
        found = client.job_log(job, num_lines) if device is None else client.device_log(device, num_lines, job)
    print_log(found, output)
    output.result({key: value for key, value in found.items() if key not in {"end", "running"}} | {"job": job})


@jobs.command(epilog=example("edgefl jobs cancel job-1a2b3c4d"))
@click.argument("job")
@connected
@json_option
def cancel(job: str, connection: CloudConnection, output: Output) -> None:
    """Stop a job. Its model so far is kept. Fails if the job has already ended by itself."""
    with connection.open() as client:
        job = client.find_job(job)
        before = client.job(job)
        state = client.cancel_job(job)["state"]
        ended = client.job(job) if state != "cancelled" else before
    if state != "cancelled":
        raise ConfigError(f"job {job} has already ended, nothing is cancelled: {ended_text(ended)}")
    if before["state"] == "cancelled":
        output.line(f"job {job} has already ended: {ended_text(before)}")
    else:
        output.line(f"job {job} is cancelled")
    output.result({"id": job, "state": state})


@jobs.command(epilog=example("edgefl jobs pause job-1a2b3c4d"))
@click.argument("job")
@connected
@json_option
def pause(job: str, connection: CloudConnection, output: Output) -> None:
    """Pause a job: its open round ends first, then its devices are free for others. It stays paused over restarts."""
    with connection.open() as client:
        job = client.find_job(job)
        state = client.pause_job(job)["state"]
    output.line(f"job {job} is paused after its open round; continue it with: edgefl jobs resume {job}")
    output.result({"id": job, "state": state})


@jobs.command(epilog=example("edgefl jobs resume job-1a2b3c4d"))
@click.argument("job")
@connected
@json_option
def resume(job: str, connection: CloudConnection, output: Output) -> None:
    """Let a paused job continue where it stopped."""
    with connection.open() as client:
        job = client.find_job(job)
        state = client.resume_job(job)["state"]
    output.line(f"job {job} continues")
    output.result({"id": job, "state": state})


@jobs.command(epilog=example("edgefl jobs watch job-1a2b3c4d --task examples/digits"))
@click.argument("job")
@click.option("--task", help="Evaluate each model on this task's test data, as `edgefl run` does.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File for the model (safetensors).")
@connected
@json_option
def watch(job: str, task: str | None, out: Path | None, connection: CloudConnection, output: Output) -> None:
    """Follow a job to its end. Ctrl-C stops watching, not the job.

    Metrics that were evaluated before, by whoever ran the job, are shown without --task.
    """
    with left_running(output, job) as standing:
        from edgefl.operator.run import WatchCallbacks
        from edgefl.operator.run import watch as watch_job
        from edgefl.task import load_task

        refuse_no_folder(out, "--out")
        loaded = load_task(task) if task is not None else None
        with connection.open() as client:
            job = standing.job = client.find_job(job)
            found = client.job(job)
            if found["kind"] == "relay":
                raise ConfigError(f"{job} carries a Flower app's messages; its rounds are shown by its `edgefl run`")
            with round_progress(output, int(found["config"]["rounds"]["count"])) as screen:
                callbacks = WatchCallbacks(
                    on_round=screen.on_round, on_waiting=partial(screen.tell_waiting, job), on_note=screen.line
                )
                result = watch_job(client, job, loaded, callbacks, out=out, patience=patience(screen.line))
    output.line(f"job {job} done in {result.seconds:.1f} s: {metrics_text(result.final) or 'no metrics'}")
    if result.stopped:
        output.line(f"stopped early: {result.stopped}")
    if result.last_evaluation.fault:
        output.line(result.last_evaluation.fault)
    output.result(result.as_json())


def _follow_log(client: CloudClient, job: str, num_lines: int, output: Output) -> None:
    shown: deque[str] = deque(maxlen=MAX_RECORDS)
    try:
        for found in follow_log(client, job, num_lines, patience(output.line)):
            for line in found["lines"]:
                output.line(str(line))
            shown.extend(found["lines"])
    except KeyboardInterrupt:
        output.line("no longer watching; the job continues")
        raise click.exceptions.Exit(INTERRUPTED) from None
    output.result({"job": job, "lines": list(shown)})


def _found(client: CloudClient, words: Sequence[str]) -> list[Json]:
    """Return the jobs that these words mean, each once."""
    ids = [client.find_job(word) for word in words]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"a job is named twice: {', '.join(ids)}; name each once")
    return [client.job(one) for one in ids]


def _why_none(job: Json) -> str:
    if job["kind"] == "relay":
        return ": the rounds of a Flower app are its ServerApp's, and are in the output of its `edgefl run`"
    return f": {job['error']}" if job["error"] else "; wait for its first"


def _metric(job: Json) -> str:
    found = headline(job.get("metrics") or {})
    return "" if found is None else metrics_text(dict([found]))


def _ago(seconds: float) -> str:
    return ago_text(time.time() - seconds)
