"""`edgefl cloud stages`: serve the cloud's part of a split model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefl.terminal.output import example

if TYPE_CHECKING:
    from cloud.stages.server import StageOptions


@click.command(
    epilog=example(
        "edgefl cloud stages classifier:3 --home /var/lib/edgefl-cloud --host 0.0.0.0 --name cloud.example.org",
        "edgefl cloud stages model.onnx --home /var/lib/edgefl-cloud --tail-from relu_4 --cuts relu_9 --cores 0-3 "
        "--cores 4-7",
    )
)
@click.argument("model")
@click.option(
    "--home", type=click.Path(path_type=Path), required=True, help="The home of the cloud beside which it runs."
)
@click.option(
    "--cuts", default="",
    help="Cuts of `edgefl offload cuts`, or tensors, between stages; each stage is one process: A,B.",
)  # fmt: skip
@click.option(
    "--tail-from", multiple=True,
    help="Cut at which the devices' part ends, or cloud: they have no part; repeatable. [default: the whole model]",
)  # fmt: skip
@click.option(
    "--model-name", default="", help="Name by which clients ask for it. [default: the release's, or the file's]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9450, show_default=True, type=click.IntRange(1, 65535), help="gRPC, mutual TLS.")
@click.option("--name", "names", multiple=True, help="Another name or address at which devices reach it.")
@click.option("--max-batch", default=32, show_default=True, type=click.IntRange(1, 4096), help="Rows of one batch.")
@click.option("--max-wait-ms", default=0.0, show_default=True, type=click.FloatRange(0, 10_000),
              help="How long a request may wait for others to be merged with, while nothing is computed.")  # fmt: skip
@click.option(
    "--cores", multiple=True, help="CPU cores of a stage, such as 0-3 or 0,2; once for each. [default: divided evenly]"
)
@click.option(
    "--memory-mb", default=0, show_default=True, type=click.IntRange(0), help="Memory limit of each stage; 0 = none."
)
@click.option(
    "--load-s", default=120.0, show_default=True, type=click.FloatRange(1), help="Time limit to load a stage."
)
@click.option(
    "--run-s", default=60.0, show_default=True, type=click.FloatRange(0.1), help="Time limit to compute a batch."
)
@click.option("--max-request-mb", default=32, show_default=True, type=click.IntRange(1, 100), help="Size of a request.")
@click.option("--device-requests", default=64, show_default=True, type=click.IntRange(1, 10_000),
              help="Requests of one device that wait or are computed.")  # fmt: skip
@click.option("--accept-nan", is_flag=True, help="Compute requests with NaN, instead of refusing them.")
@click.option("--insecure", is_flag=True, help="No TLS. For loopback only.")
def stages(**given: object) -> None:
    """Serve MODEL, or its tail, to devices by the Open Inference Protocol until Ctrl-C or SIGTERM.

    MODEL is a release of this fleet, NAME or NAME:VERSION, or an .onnx file. Requests of several devices are merged
    into batches. Run it beside the cloud, on the same home.
    """
    from cloud.stages.server import StageServer
    from edgefl.logs import set_up_logging

    set_up_logging()
    options = options_of(**given)  # type: ignore[arg-type]
    StageServer(options).serve(
        lambda address: click.echo(
            f"The stages of {options.model} are ready at {address}; Ctrl-C stops them.\n"
            "  any client of the Open Inference Protocol with a device's certificate can use them"
        )
    )


def options_of(  # noqa: PLR0913 - one parameter per option
    *, model: str, home: Path, cuts: str, tail_from: tuple[str, ...], model_name: str, host: str, port: int,
    names: tuple[str, ...], max_batch: int, max_wait_ms: float, cores: tuple[str, ...], memory_mb: int, load_s: float,
    run_s: float, max_request_mb: int, device_requests: int, accept_nan: bool, insecure: bool,
) -> StageOptions:  # fmt: skip
    """Return the options of a command line; raises ConfigError."""
    from cloud.stages.fair_queue import BatchRule
    from cloud.stages.pipeline import PipelineLimits
    from cloud.stages.server import StageOptions

    limits = PipelineLimits(
        rule=BatchRule(max_rows=max_batch, max_wait_s=max_wait_ms / 1000), device_requests=device_requests
    )
    return StageOptions(
        home=home, model=model, name=model_name, host=host, port=port, names=names, memory_mb=memory_mb,
        load_s=load_s, run_s=run_s, max_request_mb=max_request_mb, accept_nan=accept_nan, insecure=insecure,
        limits=limits, cores=tuple(parse_cores(one) for one in cores), tail_from=tail_from,
        cuts=tuple(one.strip() for one in cuts.split(",") if one.strip()),
    )  # fmt: skip


def parse_cores(text: str) -> tuple[int, ...]:
    """Return the cores of `0-3,6`; raises ConfigError for anything else, and for cores that may not be used here."""
    import os

    from edgefl.errors import ConfigError

    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--cores {text!r} is invalid; expected numbers and ranges, such as 0-3,6")
        cores.update(range(int(first), int(last or first) + 1))
    usable = os.sched_getaffinity(0)
    if not cores or not cores <= usable:
        raise ConfigError(f"--cores {text}: this process may use the cores {sorted(usable)}")
    return tuple(sorted(cores))
