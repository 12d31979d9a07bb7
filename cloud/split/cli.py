"""`edgefl cloud train-stage`: train the cloud's part of jobs with train.mode = "split"."""

from __future__ import annotations

from pathlib import Path

import click

from edgefl.terminal.output import example


@click.command(
    "train-stage",
    epilog=example("edgefl cloud train-stage --home /var/lib/edgefl-cloud --host 0.0.0.0 --name cloud.example.org"),
)
@click.option(
    "--home", type=click.Path(path_type=Path), required=True, help="The home of the cloud beside which it runs."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9470, show_default=True, type=click.IntRange(1, 65535), help="gRPC, mutual TLS.")
@click.option("--name", "names", multiple=True, help="Another name or address at which devices reach it.")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0, 1024),
              help="Threads of each job's training process; 0 = one per core.")  # fmt: skip
@click.option("--memory-mb", default=0, show_default=True, type=click.IntRange(0),
              help="Memory limit of each job's training process; 0 = none.")  # fmt: skip
@click.option("--cache-mb", default=4096, show_default=True, type=click.IntRange(1),
              help="Size of all kept activations of a job whose device part is frozen.")  # fmt: skip
@click.option(
    "--device-cache-mb", default=1024, show_default=True, type=click.IntRange(1), help="The same, of a device."
)
@click.option("--load-s", default=300.0, show_default=True, type=click.FloatRange(1),
              help="Time limit to start a training process.")  # fmt: skip
@click.option("--run-s", default=300.0, show_default=True, type=click.FloatRange(0.1),
              help="Time limit to compute one message.")  # fmt: skip
@click.option("--idle-s", default=120.0, show_default=True, type=click.FloatRange(1),
              help="A device that says nothing for so long is disconnected.")  # fmt: skip
@click.option("--max-message-mb", default=64, show_default=True, type=click.IntRange(1, 256), help="Size of a message.")
@click.option("--max-streams", default=256, show_default=True, type=click.IntRange(1, 100_000),
              help="Devices that train at the same time.")  # fmt: skip
@click.option("--insecure", is_flag=True, help="No TLS. For loopback only.")
def train_stage(  # noqa: PLR0913 - one parameter per option
    *, home: Path, host: str, port: int, names: tuple[str, ...], threads: int, memory_mb: int, cache_mb: int,
    device_cache_mb: int, load_s: float, run_s: float, idle_s: float, max_message_mb: int, max_streams: int,
    insecure: bool,
) -> None:  # fmt: skip
    """Train the cloud's part of models that are split, for all jobs of this fleet, until Ctrl-C or SIGTERM.

    Jobs name it as train.split.server. Run it beside the cloud, on the same home. It runs the code of the jobs' tasks.
    """
    from cloud.split.server import SplitServer, SplitServerOptions
    from cloud.split.service import SplitLimits
    from edgefl.logs import set_up_logging

    set_up_logging()
    limits = SplitLimits(max_message_bytes=max_message_mb << 20, idle_s=idle_s, streams=max_streams)
    options = SplitServerOptions(
        home=home, host=host, port=port, names=names, threads=threads, memory_mb=memory_mb, cache_mb=cache_mb,
        device_cache_mb=device_cache_mb, load_s=load_s, run_s=run_s, insecure=insecure, limits=limits,
    )  # fmt: skip
    SplitServer(options).serve(
        lambda address: click.echo(f"Split training is ready at {address}; Ctrl-C stops it.\n  set train.split.server")
    )
