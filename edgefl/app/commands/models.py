"""`edgefl models` and `edgefl rollout`: from trained parameters to the models that devices serve."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from click.core import ParameterSource

from edgefl.errors import ConfigError
from edgefl.operator.client import CloudClient, Json
from edgefl.operator.connection import CloudConnection, connected
from edgefl.operator.follow import follow_rollout
from edgefl.operator.publish import AUTO, BEFORE, COMPRESSIONS, MAX_DROP
from edgefl.terminal.output import INTERRUPTED, Output, counted, example, json_option, metrics_text, time_text

_SIDES = ("inputs", "outputs")
FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def models() -> None:
    """Releases: signed versions of models."""


@models.command(
    epilog=example(
        "edgefl models publish digits --task examples/digits --job job-1a2b3c4d",
        "edgefl models publish digits --onnx digits.onnx --task examples/digits",
        "edgefl models publish digits --onnx digits.onnx --sample digits.npz --metrics accuracy=0.97",
        "edgefl models publish texts --task examples/lora --job job-1a2b3c4d --base 1 --rank 8",
    )
)
@click.argument("name")
@click.option("--task", help="The task that defines the model; with --onnx, that measures it.")
@click.option("--parameters", type=FILE, help="The trained parameters: the --out of `edgefl run`.")
@click.option("--job", help="Instead of --parameters: the job that trained them.")
@click.option("--untrained", is_flag=True, help="Instead of --parameters: the task's first ones, a base for adapters.")
@click.option("--onnx", type=FILE, help="Instead of parameters: a finished ONNX file.")
@click.option("--base", type=click.IntRange(min=1), metavar="VERSION",
              help="Publish LoRA adapters on this version: devices that have it fetch the adapters alone.")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), help="The highest rank of LoRA adapters, by default their own.")
@click.option("--compress", "compression", type=click.Choice(COMPRESSIONS), default=AUTO,
              show_default=True,
              help="auto: int8 if its cost can be measured; an ONNX file only if you ask.")  # fmt: skip
@click.option("--gate", metavar="METRIC", help="What int8 is judged by; by default the task's first metric.")
@click.option("--max-drop", default=MAX_DROP, show_default=True,
              help="Allowed loss: 0.02 = 2 points of accuracy, or 2% of what the model has learned; "
                   "2% = of the metric's value before.")  # fmt: skip
@click.option("--sample", type=FILE, help="With --onnx alone: an .npz file with an array for each input, to try it on.")
@click.option(
    "--metrics", multiple=True, metavar="NAME=NUMBER", help="With --onnx alone: metrics to publish; repeatable."
)
@click.option("--new-signature", is_flag=True,
              help="Allow other inputs and outputs than those of the version before.")  # fmt: skip
@connected
@json_option
def publish(  # noqa: PLR0913 - one a flag
    *, name: str, task: str | None, parameters: Path | None, job: str | None, untrained: bool, onnx: Path | None,
    base: int | None, rank: int | None, compression: str, gate: str | None, max_drop: str, sample: Path | None,
    metrics: tuple[str, ...], new_signature: bool, connection: CloudConnection, output: Output,
) -> None:  # fmt: skip
    """Publish a model as the next version of NAME.

    A task's parameters are exported to ONNX, compared with what they came from, and compressed. A finished ONNX file is
    published as it is; with --task, its metrics are measured on the task's test data. The file is loaded and run as on
    a device, in a process of its own; then the cloud signs it.
    """
    from edgefl.operator import adapters
    from edgefl.operator import publish as publishing
    from edgefl.task import load_task

    sources = (parameters, job, onnx, untrained or None)
    if sum(source is not None for source in sources) != 1 or (task is None and onnx is None):
        raise ConfigError(
            "name one source: --task with --parameters, --job or --untrained, or --onnx, with --task if its test data "
            "measure it"
        )
    if onnx is not None and (base is not None or rank is not None):
        raise ConfigError("--base and --rank are for a task's adapters, which an ONNX file has not. Leave them out")
    publishing.check_request(name, max_drop, parameters, onnx, sample)
    compression = _refuse_useless_flags(is_onnx=onnx is not None, has_task=task is not None, on_base=base is not None)
    given = publishing.parse_metrics(metrics)
    loaded = None if task is None else load_task(task)  # a missing extra is told before the cloud is asked
    with connection.open() as client, tempfile.TemporaryDirectory(prefix="edgefl-publish-") as made:
        folder = Path(made)
        if job is None:
            publishing.refuse_unreachable(client)
        if onnx is not None and loaded is None:
            release = publishing.publish_onnx(
                client, name, onnx, sample=sample, metrics=given, new_signature=new_signature
            )
        elif loaded is not None:
            on = None if base is None else adapters.base_release(client, name, base)
            source = (
                onnx
                or parameters
                or (adapters.untrained(loaded, folder) if untrained else _trained(client, str(job), folder, output))
            )
            if rank is not None:
                source, error = adapters.at_rank_in(source, rank, folder)
                output.line(f"adapters of rank {rank}: relative error {error:.2g}")
            make = publishing.export if onnx is None else publishing.measured
            exported = make(loaded, source, folder, compression=compression, max_drop=max_drop, gate=gate)
            if on is not None:
                exported = adapters.on_base(client, on, exported, loaded, source)
            release = publishing.publish(client, name, exported, new_signature=new_signature)
    say_published(release, output)
    output.result(release)


@models.command(epilog=example("edgefl models adapter --task examples/lora --job job-1a2b3c4d --out adapter"))
@click.option("--task", required=True, help="The task that defines the model.")
@click.option("--parameters", type=FILE, help="The trained parameters: the --out of `edgefl run`.")
@click.option("--job", help="Instead of --parameters: the job that trained them.")
@click.option("--rank", type=click.IntRange(min=1), help="The highest rank; by default what the adapters have.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The folder to write.")
@connected
@json_option
def adapter(  # noqa: PLR0913 - one a flag
    *, task: str, parameters: Path | None, job: str | None, rank: int | None, out: Path, connection: CloudConnection,
    output: Output,
) -> None:  # fmt: skip
    """Write trained LoRA adapters in the form that peft loads."""
    from edgefl.models.adapters.peft_format import write_adapter
    from edgefl.task import load_task
    from edgefl.trees import SpooledTree

    if (parameters is None) == (job is None):
        raise ConfigError("name one source: --parameters or --job")
    loaded = load_task(task)
    with tempfile.TemporaryDirectory(prefix="edgefl-adapter-") as made:
        if parameters is None:
            with connection.open() as client:
                parameters = _trained(client, str(job), Path(made), output)
        ranks = write_adapter(loaded, SpooledTree(parameters), out, rank)
    output.line(f"{out}: adapters of {counted(len(ranks), 'layer')}, ranks {min(ranks.values())} to "
                f"{max(ranks.values())}")  # fmt: skip
    output.result({"path": str(out), "ranks": ranks})


@models.command("list", epilog=example("edgefl models list"))
@connected
@json_option
def list_models(connection: CloudConnection, output: Output) -> None:
    """List every release of every model."""
    with connection.open() as client:
        found = client.models()
    _table(found, output)


@models.command(epilog=example("edgefl models show digits"))
@click.argument("name")
@connected
@json_option
def show(name: str, connection: CloudConnection, output: Output) -> None:
    """List the versions of one model, the newest first."""
    with connection.open() as client:
        found = client.model(name)
    _table(found, output)


@click.group()
def rollout() -> None:
    """Which version the devices serve."""


@rollout.command(
    epilog=example(
        "edgefl rollout start digits --to site=north --wait 60", "edgefl rollout start digits --version 3 --rollback"
    )
)
@click.argument("model")
@click.option("--version", type=click.IntRange(min=1), help="By default the newest version.")
@click.option("--to", multiple=True, default=("all",), show_default=True, help="all, TAG=VALUE or name:DEVICE.")
@click.option("--rollback", is_flag=True, help="Allow a version older than the one that is served.")
@click.option("--wait", "wait_s", type=click.FloatRange(min=0), help="Wait up to this many seconds for the devices.")
@connected
@json_option
def start(  # noqa: PLR0913 - one a flag
    *, model: str, version: int | None, to: tuple[str, ...], rollback: bool, wait_s: float | None,
    connection: CloudConnection, output: Output,
) -> None:  # fmt: skip
    """Tell devices to serve a version. With --wait, fails unless all of them do in time."""
    with connection.open() as client:
        status = client.start_rollout(model, version, to, rollback=rollback)
        output.line(
            f"{status['id']}: {model} version {status['version']} to {counted(len(status['devices']), 'device')}"
        )
        if wait_s is not None:
            try:
                status = _waited(client, status, wait_s, output)
            except KeyboardInterrupt:
                output.line(f"\nno longer waiting; the rollout continues. See: edgefl rollout status {status['id']}")
                raise click.exceptions.Exit(INTERRUPTED) from None
            _devices(status, output)
        else:
            output.line(f"see its progress: edgefl rollout status {status['id']}")
    output.result(status)
    if wait_s is not None and status["state"] != "done":
        raise click.exceptions.Exit(1)


@rollout.command("status", epilog=example("edgefl rollout status rollout-1a2b3c4d"))
@click.argument("rollout_id", metavar="[ROLLOUT]", required=False)
@connected
@json_option
def show_status(rollout_id: str | None, connection: CloudConnection, output: Output) -> None:
    """Show the progress of each device; without a ROLLOUT, list all rollouts."""
    with connection.open() as client:
        found = client.rollout(rollout_id) if rollout_id else client.rollouts()
    if isinstance(found, dict):
        output.line(f"{found['id']}: {found['model']} version {found['version']}, {found['state']}")
        _devices(found, output)
    else:
        rows = [
            (one["id"], one["model"], one["version"], one["state"], len(one["devices"]), time_text(one["created_s"]))
            for one in found
        ]
        output.table(
            ("id", "model", "version", "state", "devices", "started"),
            rows,
            "no rollout yet; `edgefl rollout start` starts one",
            whole=("id", "model"),
            spare=("started",),
        )
    output.result(found)


def _waited(client: CloudClient, status: Json, wait_s: float, output: Output) -> Json:
    """Follow a rollout until it is over or the time is up; return its last status."""
    said = ""
    for now in follow_rollout(client, status["id"], wait_s):
        status = now
        active = sum(one["state"] == "active" for one in status["devices"])
        text = f"{status['state']}: {active} of {counted(len(status['devices']), 'device')} active"
        if text != said:  # the state "downloading" changes nothing here
            output.line(text)
        said = text
    return status


def _trained(client: CloudClient, job: str, folder: Path, output: Output) -> Path:
    """Download what a job trained, and say if that is not all."""
    from edgefl.operator import publish as publishing

    found = publishing.trained_job(client, job)
    if note := publishing.what_is_missing(found):
        output.line(note)
    return publishing.parameters_of(client, found, folder)


def _refuse_useless_flags(*, is_onnx: bool, has_task: bool, on_base: bool = False) -> str:
    """Return the compression: of an ONNX file, none unless it was typed. Raises ConfigError for useless flags."""
    context = click.get_current_context()
    typed = {
        one.name: one.opts[0]
        for one in context.command.params
        if one.name and context.get_parameter_source(one.name) is ParameterSource.COMMANDLINE
    }
    compression = str(context.params["compression"])
    if (is_onnx or on_base) and "compression" not in typed:
        compression = "none"
    if on_base and compression != "none":
        raise ConfigError("--compress: an adapter on a base is not compressed, as its base is not. Leave it out")
    others: tuple[str, ...] = ("sample", "metrics")
    why = "a task's own data give the sample and the metrics"
    if not has_task:
        others = ("gate", "max_drop", *(["compression"] if compression != "none" else []))
        why = "without --task there are no data that could judge a compressed form of the ONNX file"
    elif compression == "none":
        others = ("gate", "max_drop", *others)
        why = f"without compression nothing is judged, and {why}"
    if useless := [typed[name] for name in others if name in typed]:
        raise ConfigError(f"{', '.join(useless)} would do nothing here: {why}. Leave it out")
    return compression


def say_published(release: Json, output: Output) -> None:
    """Print a release, how it was compressed, and the command that delivers it."""
    output.line(f"{release['model']} version {release['version']}: {_metrics(release)}".rstrip(": "))
    if release["note"]:
        output.line(release["note"])
    if report := release["compression"]:
        output.line(
            f"int8: {report['source_bytes'] / 1024:.0f} -> {report['target_bytes'] / 1024:.0f} KiB, "
            f"{report['measure']} {report['before']:.4f} -> {report['after']:.4f} (drop {report['drop']:.4f})"
        )
    output.line(f"deliver it to the devices: edgefl rollout start {release['model']} --version {release['version']}")


def _metrics(release: Json) -> str:
    return metrics_text({name: value for name, value in release["metrics"].items() if not name.startswith(BEFORE)})


def _signature(release: Json) -> str:
    """Return what a model takes and returns in one text; empty for a release of an older version of edgefl."""
    sides = [", ".join(f"{name} {text}" for name, text in release.get(side, {}).items()) for side in _SIDES]
    return " -> ".join(sides) if any(sides) else ""


def _table(releases: list[Json], output: Output) -> None:
    rows = [
        (one["model"], one["version"], f"{one['blob']['size'] / 1024:.0f} KiB", _metrics(one),
         time_text(one["created_s"]), _signature(one))
        for one in releases
    ]  # fmt: skip
    columns = ("model", "version", "size", "metrics", "published", "signature")
    output.table(
        columns, rows, "no model yet; `edgefl models publish` publishes one", whole=("model",),
        spare=("signature", "published", "size"),
    )  # fmt: skip
    output.result(releases)


def _devices(status: Json, output: Output) -> None:
    rows = [(one["device"], one["state"], one["detail"]) for one in status["devices"]]
    output.table(("device", "state", "detail"), rows, "no device is left in it: a later rollout replaced it",
                 whole=("device",))  # fmt: skip
