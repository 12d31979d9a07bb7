"""`edgefl devices` and `edgefl jobs`: list, show, change."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from edgefl.app.commands.progress import left_running, patience, round_progress, round_text
from edgefl.errors import ConfigError
from edgefl.operator.client import Json
from edgefl.operator.connection import CloudConnection, connected
from edgefl.records import RoundReport
from edgefl.terminal.output import Output, example, json_option, metrics_text, refuse_no_folder, time_text


@click.group()
def devices() -> None:
    """The devices of the fleet."""


@devices.command("list", epilog=example("edgefl devices list --json -"))
@connected
@json_option
def list_devices(connection: CloudConnection, output: Output) -> None:
    """List every enrolled device and what it serves."""
    with connection.open() as client:
        found = client.devices()
    rows = [
        (one["name"], "online" if one["online"] else "offline", _pairs(one["models"], ":"), _pairs(one["tags"], "="),
         *_telemetry(one.get("telemetry")), one["serving_url"], time_text(one["enrolled_s"]))
        for one in found
    ]  # fmt: skip
    columns = ("name", "state", "models", "tags", "cpu", "free memory", "free disk", "serving", "enrolled")
    output.table(columns, rows, "no device is enrolled; `edgefl cloud token` makes a token for one")
    output.result(found)


@devices.command(epilog=example("edgefl devices remove cam-1"))
@click.argument("name")
@connected
def remove(name: str, connection: CloudConnection) -> None:
    """Remove a device and reject its certificate from now on."""
    with connection.open() as client:
        client.remove_device(name)
    click.echo(f"device {name} is removed from the fleet")


@click.group()
def jobs() -> None:
    """Federated trainings, running and ended."""


@jobs.command("list", epilog=example("edgefl jobs list"))
@connected
@json_option
def list_jobs(connection: CloudConnection, output: Output) -> None:
    """List every job, the newest first."""
    with connection.open() as client:
        found = client.jobs()
    rows = [
        (one["id"], _name(one), one["state"], _progress(one), time_text(one["created_s"]), one["error"])
        for one in found
    ]
    output.table(("id", "task", "state", "rounds", "started", "error"), rows, "no job yet; `edgefl run` starts one")
    output.result(found)


@jobs.command(epilog=example("edgefl jobs show job-1a2b3c4d --json -"))
@click.argument("job")
@connected
@json_option
def show(job: str, connection: CloudConnection, output: Output) -> None:
    """Show one job and its rounds."""
    with connection.open() as client:
        found = client.job(job)
    output.line(f"{found['id']} {_name(found)}: {found['state']}, {_progress(found, ' rounds')}")
    if found.get("waiting"):
        output.line(found["waiting"])
    for outcome in found.get("rounds", ()):
        output.line(round_text(RoundReport.from_json(outcome), found["config"]["rounds"]["count"]))
    if found["error"]:
        output.line(f"error: {found['error']}")
    output.result(found)


@jobs.command(epilog=example("edgefl jobs cancel job-1a2b3c4d"))
@click.argument("job")
@connected
def cancel(job: str, connection: CloudConnection) -> None:
    """Stop a job. Its model so far is kept. Fails if the job has already ended by itself."""
    with connection.open() as client:
        before = client.job(job)
        state = client.cancel_job(job)["state"]
        ended = client.job(job) if state != "cancelled" else before
    if state != "cancelled":
        raise ConfigError(f"job {job} has already ended, nothing is cancelled: {_ended(ended)}")
    if before["state"] == "cancelled":
        click.echo(f"job {job} has already ended: {_ended(before)}")
    else:
        click.echo(f"job {job} is cancelled")


@jobs.command(epilog=example("edgefl jobs watch job-1a2b3c4d --task examples/digits"))
@click.argument("job")
@click.option("--task", help="Evaluate each model on this task's test data, as `edgefl run` does.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File for the model (safetensors).")
@connected
@json_option
def watch(job: str, task: str | None, out: Path | None, connection: CloudConnection, output: Output) -> None:
    """Follow a job to its end. Ctrl-C stops watching, not the job."""
    with left_running(output, job):
        from edgefl.operator.run import WatchCallbacks
        from edgefl.operator.run import watch as watch_job
        from edgefl.task import load_task

        refuse_no_folder(out, "--out")
        loaded = load_task(task) if task is not None else None
        with connection.open() as client:
            found = client.job(job)
            if found["kind"] == "relay":
                raise ConfigError(f"{job} carries a Flower app's messages; its rounds are shown by its `edgefl run`")
            with round_progress(output, int(found["config"]["rounds"]["count"])) as screen:
                callbacks = WatchCallbacks(on_round=screen.on_round, on_waiting=partial(screen.tell_waiting, job))
                result = watch_job(client, job, loaded, callbacks, out=out, patience=patience(screen.line))
    output.line(f"job {job} done in {result.seconds:.1f} s: {metrics_text(result.final) or 'no metrics'}")
    output.result(result.as_json())


def _name(job: Json) -> str:
    return str(job.get("name") or job["task"])


def _progress(job: Json, noun: str = "") -> str:
    if job["kind"] == "relay":
        return f"{job['answered']}/{job['sent']} messages"
    return f"{job['rounds_done']}/{job['config']['rounds']['count']}{noun}"


def _ended(job: Json) -> str:
    """Return how and when a job ended."""
    how = {"done": "it was done", "failed": "it failed", "cancelled": "it was cancelled"}[job["state"]]
    why = f" ({job['error']})" if job["state"] == "failed" else ""
    return f"{how} at {time_text(job['ended_s'])}, after {_progress(job, ' rounds')}{why}"


def _telemetry(seen: Json | None) -> tuple[str, str, str]:
    """Return what a device measured last: CPU in use, free memory, free disk; empty texts if it has not yet."""
    if seen is None:
        return "", "", ""
    return (
        f"{seen['cpu_percent']:.0f}% of {seen['cpu_count']}",
        f"{seen['ram_available_mb'] / 1e3:.1f}/{seen['ram_total_mb'] / 1e3:.1f} GB",
        f"{seen['disk_free_mb'] / 1e3:.1f} GB",
    )


def _pairs(values: Json, between: str) -> str:
    return " ".join(f"{key}{between}{value}" for key, value in sorted(values.items()))
