"""`edgefl cloud generate`: serve the tail of a language model."""

from __future__ import annotations

from pathlib import Path

import click

from edgefl.terminal.output import example


@click.command(
    epilog=example(
        "edgefl cloud generate smollm2/tail --home /var/lib/edgefl-cloud --host 0.0.0.0 --name cloud.example.org",
        "edgefl cloud generate smollm2/tail --home /var/lib/edgefl-cloud --engine torch:cuda --cache-mb 8192",
        "edgefl cloud generate large/tail --home /var/lib/edgefl-cloud --join /run/edgefl/tail.sock",
    )
)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--home", type=click.Path(path_type=Path), required=True, help="The home of the cloud beside which it runs."
)
@click.option("--model-name", default="", help="Name by which devices ask for it. [default: the model's]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9460, show_default=True, type=click.IntRange(1, 65535), help="gRPC, mutual TLS.")
@click.option("--name", "names", multiple=True, help="Another name or address at which devices reach it.")
@click.option(
    "--engine", default="auto", show_default=True,
    help="What computes: torch, torch:DEVICE, or numpy. auto: torch on a GPU, else numpy, which is faster on a CPU.",
)  # fmt: skip
@click.option("--join", type=click.Path(path_type=Path, dir_okay=False), metavar="SOCKET",
              help="Instead of a process of its own: torchrun's, of which the first connects here.")  # fmt: skip
@click.option("--max-sequences", default=32, show_default=True, type=click.IntRange(1, 1024),
              help="Sequences whose next tokens are computed together.")  # fmt: skip
@click.option("--prompt-rows", default=256, show_default=True, type=click.IntRange(1, 8192),
              help="Tokens of prompts that are computed in one step.")  # fmt: skip
@click.option("--cache-mb", default=1024, show_default=True, type=click.IntRange(1),
              help="Memory for the keys and values of all sequences. One device may have half of it.")  # fmt: skip
@click.option("--device-sequences", default=8, show_default=True, type=click.IntRange(1, 1000),
              help="Sequences of one device.")  # fmt: skip
@click.option("--lease-s", default=60.0, show_default=True, type=click.FloatRange(1),
              help="A sequence without a request for this time is ended.")  # fmt: skip
@click.option(
    "--memory-mb", default=0, show_default=True, type=click.IntRange(0), help="Memory limit of its process; 0 = none."
)
@click.option(
    "--load-s", default=120.0, show_default=True, type=click.FloatRange(1), help="Time limit to load the stage."
)
@click.option(
    "--run-s", default=60.0, show_default=True, type=click.FloatRange(0.1), help="Time limit to compute a step."
)
@click.option("--max-request-mb", default=32, show_default=True, type=click.IntRange(1, 100), help="Size of a request.")
@click.option("--insecure", is_flag=True, help="No TLS. For loopback only.")
def generate(max_sequences: int, prompt_rows: int, model_name: str, **given: object) -> None:
    """Serve the tail in FOLDER to devices that have its head, until Ctrl-C or SIGTERM.

    FOLDER is the `tail` that `edgefl offload split-decoder` wrote. Run it beside the cloud, on the same home.
    """
    from cloud.generation.server import TailOptions, TailServer
    from cloud.generation.tail import TailLimits
    from edgefl.logs import set_up_logging

    set_up_logging()
    limits = TailLimits(max_sequences=max_sequences, prompt_rows=prompt_rows)
    options = TailOptions(name=model_name, limits=limits, **given)  # type: ignore[arg-type]  # click has typed them
    TailServer(options).serve(
        lambda address: click.echo(
            f"The tail in {options.folder} is ready at {address}; Ctrl-C stops it.\n"
            f"  on a device: edgefl agent start --generate HEAD_FOLDER --generate-tail {address}"
        )
    )
