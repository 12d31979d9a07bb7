"""`edgefl offload publish`: a release that devices share with a stage server."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import click

from edgefl.app.offload.options import FILE, of_model
from edgefl.errors import ConfigError
from edgefl.models.compress import parse_max_drop
from edgefl.operator.connection import CloudConnection, connected
from edgefl.operator.publish import BEFORE
from edgefl.terminal.output import Output, example, json_option

_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")


@click.command(
    epilog=example(
        "edgefl offload publish digits --cut split:relu_4 --stages cloud.example.org:9450 --fallback small:3",
        "edgefl offload publish examples/offload --parameters big.safetensors --cut split:relu_4 --whole device "
        "--whole cloud --placement auto --stages cloud.example.org:9450",
    )
)
@of_model
@click.option("--name", help="The release's name. [default: that of MODEL]")
@click.option("--cut", "cuts", multiple=True, help="A cut at which it may be split; repeatable.")
@click.option("--whole", "whole_on", multiple=True, type=click.Choice(("device", "cloud")),
              help="Where the whole model may run, too; repeatable.")  # fmt: skip
@click.option("--placement", "use", default="", metavar="auto|device|cloud|split:NODE",
              help="Which one devices use. [default: auto, if there are several]")  # fmt: skip
@click.option("--format", "form", type=click.Choice(("auto", "fp32", "fp16", "bf16", "int8")), default="auto",
              show_default=True, help="Wire format; auto: the smallest that --max-drop allows.")  # fmt: skip
@click.option("--max-drop", default="0.02", show_default=True, help="What a wire format may cost.")
@click.option("--samples", type=FILE, help="An .npz file of your own inputs, to judge wire formats.")
@click.option("--stages", multiple=True, metavar="HOST:PORT",
              help="Where devices reach a stage server; repeatable, in the order in which they are tried.")  # fmt: skip
@click.option("--fallback", metavar="FILE|NAME[:VERSION]",
              help="The model that answers on the device when the cloud does not.")  # fmt: skip
@click.option("--cascade", "threshold", type=click.FloatRange(0, 1, min_open=True), metavar="CONFIDENCE",
              help="The fall-back answers first; only rows below this confidence go on.")  # fmt: skip
@click.option("--objective", type=click.Choice(("latency", "throughput", "memory", "cloud-cost")), default="latency",
              show_default=True, help="What placement auto makes small.")  # fmt: skip
@click.option("--within", default="1s", show_default=True, metavar="TIME",
              help="When the fall-back answers, unless a request says its own time.")  # fmt: skip
@click.option("--new-signature", is_flag=True,
              help="Allow other inputs and outputs than those of the version before.")  # fmt: skip
@connected
@json_option
def publish(  # noqa: PLR0913 - one a flag
    *, model: str, version: int | None, parameters: Path | None, sample: Path | None, name: str | None,
    cuts: tuple[str, ...], whole_on: tuple[str, ...], use: str, form: str, max_drop: str, samples: Path | None,
    stages: tuple[str, ...], fallback: str | None, threshold: float | None, objective: str, within: str,
    new_signature: bool, connection: CloudConnection, output: Output,
) -> None:  # fmt: skip
    """Publish MODEL as a release that is split: devices run the head, a stage server the rest.

    MODEL is a release, a task or an .onnx file in float32. Each cut is split and compared with the whole model. The
    release is signed, rolled out and rolled back like any other; devices fetch the files that their placement needs.
    """
    from edgefl.app.offload.plan import own_samples
    from edgefl.operator.publish import refuse_unreachable
    from edgefl.operator.publishing.placing import PlacingRequest, make_placed, placements_text, publish_placed
    from edgefl.operator.splitting import open_fallback, open_source

    parse_max_drop(max_drop)
    timeout_ms = _milliseconds(within)
    with connection.open() as client:
        refuse_unreachable(client)
    with tempfile.TemporaryDirectory(prefix="edgefl-offload-") as made:
        folder = Path(made)
        source = open_source(model, folder, connection, version=version, parameters=parameters, sample=sample)
        file, release = (None, "") if fallback is None else open_fallback(fallback, folder, connection)
        metrics = {key: value for key, value in source.metrics.items() if not key.startswith(BEFORE)}
        if source.task is not None:
            from edgefl.models.gate import OtherFile

            metrics = dict(OtherFile(source.task, source.path).measured())
        request = PlacingRequest(
            name=name or source.name, cuts=cuts, whole_on=whole_on, use=use, form=form, max_drop=max_drop,
            samples=own_samples(source, samples) if samples else {}, fallback=file, fallback_release=release,
            threshold=threshold or 0.0, stages=stages, objective=objective, timeout_ms=timeout_ms, metrics=metrics,
            new_signature=new_signature,
        )  # fmt: skip
        own = folder / "parts"
        own.mkdir()
        placed = make_placed(source, request, own)
        with connection.open() as client:
            found = publish_placed(client, placed, request)
    output.line(f"{found['model']} version {found['version']}, placement {placed.offload.use}:")
    for line in placements_text(placed.offload):
        output.line(f"  {line}")
    output.line("  how much can be read from what crosses was not measured here: edgefl offload plan --leak")
    if placed.offload.fallback is None:
        output.line("  no fall-back: without the cloud, requests are refused (--fallback)")
    which = f"{found['model']}:{found['version']}"
    output.line(f"serve its tail beside the cloud: edgefl cloud stages {which} --home HOME")
    output.line(f"deliver it to the devices: edgefl rollout start {found['model']} --version {found['version']}")
    output.result(found)


def _milliseconds(text: str) -> float:
    match = _TIME.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(f"--within {text!r} is no time, such as 300ms or 2s")
    return float(match[1]) * (1e3 if match[2] == "s" else 1.0)
