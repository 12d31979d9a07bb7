"""`edgefl offload`: where a model can be divided between a device and the cloud."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from edgefl.app.offload.decoder import publish_decoder, split_decoder
from edgefl.app.offload.options import FILE, of_model
from edgefl.errors import ConfigError
from edgefl.operator.connection import CloudConnection, connected
from edgefl.terminal.output import Output, counted, example, json_option, refuse_no_folder

SLOWEST = 10  # layers that `profile` shows


class _OffloadCommands(click.Group):
    """Imports `publish` when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "publish"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "publish":
            from edgefl.app.offload.publish import publish

            return publish
        return super().get_command(ctx, cmd_name)


@click.group(cls=_OffloadCommands)
def offload() -> None:
    """Models that are too large for a device: split between device and cloud."""


offload.add_command(split_decoder)
offload.add_command(publish_decoder)


@offload.command(
    epilog=example(
        "edgefl offload cuts examples/digits",
        "edgefl offload cuts digits --version 3 --single",
    )
)
@of_model
@click.option("--single", is_flag=True, help="Only cuts that one tensor alone crosses.")
@connected
@json_option
def cuts(  # noqa: PLR0913 - one a flag
    *, model: str, version: int | None, parameters: Path | None, sample: Path | None, single: bool,
    connection: CloudConnection, output: Output,
) -> None:  # fmt: skip
    """List where MODEL can be split: an .onnx file, a task, or the name of a release.

    For each cut: the bytes that cross it for the sample's first inputs (usually one row), how many tensors these are,
    and the bytes of the weights on both sides. Weights that both sides need are counted on both.
    """
    from edgefl.offload.cuts import all_tensors, find_cuts
    from edgefl.offload.graph import read_graph
    from edgefl.operator.splitting import open_source

    with tempfile.TemporaryDirectory(prefix="edgefl-offload-") as folder:
        source = open_source(
            model, Path(folder), connection, version=version, parameters=parameters, sample=sample
        )  # fmt: skip
        graph = read_graph(source.path)
        found = [one for one in find_cuts(graph, all_tensors(graph, source.feeds)) if one.is_single or not single]
    if not found:
        raise ConfigError(f"{source.who} cannot be split: it has {counted(len(graph.layers), 'layer')}, and no cut")
    rows = [
        (
            one.name, one.operator, one.num_bytes, "single" if one.is_single else f"{len(one.tensors)} tensors",
            one.device_parameter_bytes, one.cloud_parameter_bytes, "inputs" if one.sends_inputs else "activations",
            ", ".join(map(str, one.tensors)),
        )
        for one in found
    ]  # fmt: skip
    output.line(f"{source.who}: {counted(len(found), 'cut')}, {sum(one.is_single for one in found)} single")
    if shared := max(one.shared_parameter_bytes for one in found):
        output.line(f"weights that both sides of a cut need, such as tied ones, are in both: up to {shared} bytes")
    output.table(
        ("cut", "operator", "bytes", "crosses", "device weights", "cloud weights", "leaves", "tensors"),
        rows, "", whole=("cut",), spare=("tensors", "operator"),
    )  # fmt: skip
    inputs = {name: list(array.shape) for name, array in source.feeds.items()}
    output.result({"model": source.who, "inputs": inputs, "cuts": [one.as_json() for one in found]})


@offload.command(epilog=example("edgefl offload profile digits --version 3 --json cam-3.json"))
@of_model
@connected
@json_option
def profile(
    *, model: str, version: int | None, parameters: Path | None, sample: Path | None, connection: CloudConnection,
    output: Output,
) -> None:  # fmt: skip
    """Measure each layer of MODEL on this machine.

    Run it on a device, and give the --json file to `edgefl offload plan --device` for the same version of the model.
    """
    from edgefl.offload.graph import read_graph
    from edgefl.offload.plans.timing import as_json, machine_name, measure_layers
    from edgefl.operator.splitting import open_source

    with tempfile.TemporaryDirectory(prefix="edgefl-offload-") as folder:
        source = open_source(model, Path(folder), connection, version=version, parameters=parameters, sample=sample)
        graph = read_graph(source.path)
        times = measure_layers(graph, source.feeds, machine_name())
        told = as_json(times, graph)
    output.line(f"{source.who} on {times.machine}: {sum(times.layers_ms):.3g} ms")
    slowest = sorted(zip(graph.layers, times.layers_ms, strict=True), key=lambda one: -one[1])[:SLOWEST]
    output.table(
        ("layer", "operator", "ms"),
        [(one.name, one.operator, f"{ms:.3g}") for one, ms in slowest],
        "",
        whole=("layer",),
    )
    output.result(told)


@offload.command(
    epilog=example(
        "edgefl offload plan digits --device 5x --link 20mbit,30ms --memory 64MB --plot plan.png",
        "edgefl offload plan digits --device cam-3.json --link 5mbit/50mbit,60ms --objective cloud-cost --within 100ms",
        "edgefl offload plan digits --device 5x --link 20mbit,30ms --may-leave activations --leak --samples own.npz",
    )
)
@of_model
@click.option("--device", required=True, metavar="NAME|FILE|Nx",
              help="An enrolled device that serves MODEL, a file of `edgefl offload profile`, or how many times slower "
                   "than this machine: 5x.")  # fmt: skip
@click.option("--link", required=True, metavar="RATE,RTT", help="20mbit,30ms; other rate down: 5mbit/50mbit,30ms.")
@click.option("--memory", metavar="SIZE", help="What the head may need on the device, such as 64MB.")
@click.option("--objective", type=click.Choice(("latency", "throughput", "memory", "cloud-cost")), default="latency",
              show_default=True, help="What is made as small, or as fast, as possible.")  # fmt: skip
@click.option("--within", metavar="TIME", help="The longest latency that is allowed, such as 100ms.")
@click.option("--may-leave", type=click.Choice(("nothing", "activations", "inputs")), default="inputs",
              show_default=True, help="What may leave the device.")  # fmt: skip
@click.option("--format", "formats", multiple=True, type=click.Choice(("fp32", "fp16", "bf16", "int8")),
              help="Only these wire formats; repeatable. By default all.")  # fmt: skip
@click.option("--max-drop", default="0.02", show_default=True, help="What a wire format may cost.")
@click.option("--samples", type=FILE, help="An .npz file of your own inputs, to judge wire formats and attack.")
@click.option("--measure-all", is_flag=True, help="Make and time the stages of every cut, not of the best few.")
@click.option("--leak", is_flag=True, help="Attack every cut with --samples, or a task's own data.")
@click.option("--plot", type=FILE, help="Draw all cuts into a .png or .svg.")
@connected
@json_option
def plan(
    *, model: str, version: int | None, parameters: Path | None, sample: Path | None, connection: CloudConnection,
    output: Output, **flags: Any,
) -> None:  # fmt: skip
    """Find where MODEL is best split between a device and the cloud, which this machine stands for.

    Each layer is timed here. A cut's cost is its layers' time on the device, the bytes that cross over the link, and
    the other layers' time in the cloud; all on the device and all in the cloud are candidates, too. The best few are
    made and timed. A wire format is taken if the task's metric, or the outputs on samples, lose no more than
    --max-drop.
    With --leak, an attack tries to read the inputs from what crosses each cut, and the table says how much it got.
    """
    from edgefl.app.offload.plan import PlanFlags, make_plan
    from edgefl.operator.splitting import open_source

    request = PlanFlags(**flags)
    request.check()
    with tempfile.TemporaryDirectory(prefix="edgefl-offload-") as folder:
        source = open_source(model, Path(folder), connection, version=version, parameters=parameters, sample=sample)
        make_plan(source, request, connection, output)


@offload.command(
    epilog=example(
        "edgefl offload export digits --cut split:relu_4 --out models",
        "edgefl offload export model.onnx --cut split:relu_4 --cut split:relu_9 --out models --head head.onnx",
    )
)
@of_model
@click.option("--cut", "cuts", multiple=True, required=True,
              help="Where the devices' part ends; more of them cut the rest into stages.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The repository's folder.")
@click.option("--name", help="The model's name. [default: the release's, the task's or the file's]")
@click.option("--max-batch", default=32, show_default=True, type=click.IntRange(0, 4096),
              help="Rows of one batch; 0 = requests are not merged.")  # fmt: skip
@click.option("--head", type=FILE, help="Also write the devices' part, to this file.")
@connected
@json_option
def export(  # noqa: PLR0913 - one a flag
    *, model: str, version: int | None, parameters: Path | None, sample: Path | None, cuts: tuple[str, ...], out: Path,
    name: str | None, max_batch: int, head: Path | None, connection: CloudConnection, output: Output,
) -> None:  # fmt: skip
    """Write the cloud's part of MODEL into a model repository, which a Triton server can serve to devices.

    The part behind N layers is the model NAME.N, as devices ask for it. With several cuts, each stage is a model, and
    NAME.N an ensemble of them. The stages are compared with the whole model on its sample first.
    """
    from edgefl.app.offload.export import ExportRequest, export_stages
    from edgefl.operator.splitting import open_source

    refuse_no_folder(head, "--head")
    with tempfile.TemporaryDirectory(prefix="edgefl-offload-") as folder:
        source = open_source(model, Path(folder), connection, version=version, parameters=parameters, sample=sample)
        request = ExportRequest(
            cuts=cuts, folder=out, name=name or source.name, version=source.version, max_batch=max_batch, head=head
        )
        found = export_stages(source, request)
    for one in found:
        shown = ", ".join(map(str, one.inputs)), ", ".join(map(str, one.outputs))
        output.line(f"{one.name} version {one.version}: {shown[0]} -> {shown[1]}")
    output.line(f"serve it: tritonserver --model-repository {out}")
    output.result(
        {
            "folder": str(out),
            "models": [
                {
                    "name": one.name, "version": one.version, "digest": one.digest, "max_batch": one.max_batch,
                    "inputs": [info.as_json() for info in one.inputs],
                    "outputs": [info.as_json() for info in one.outputs],
                }
                for one in found
            ],
        }
    )  # fmt: skip
