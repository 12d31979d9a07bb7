"""`edgefl region`: start a region between a cloud and its devices."""

from __future__ import annotations

from pathlib import Path

import click

from edgefl.terminal.output import example


@click.group()
def region() -> None:
    """Run a region: an aggregator between devices and the cloud, or another region."""


@region.command(
    epilog=example(
        "edgefl region start --home /srv/oslo --parent https://cloud.example.org:9480 --token-file token.txt "
        "--name oslo --host 0.0.0.0 --address oslo.example.org"
    )
)
@click.option("--home", type=click.Path(path_type=Path), required=True, help="The region's folder.")
@click.option(
    "--parent", default="", help="https://HOST:PORT of the cloud, or of the region above; at the first start."
)
@click.option("--token", default="", help="From `edgefl cloud token --role region`; at the first start.")
@click.option("--token-file", type=click.File(), help="The token in a file; - is stdin.")
@click.option("--name", default="", help="The region's name in the fleet; at the first start.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--address", default="", help="Name or address at which devices reach this region. [default: --host]")
@click.option("--grpc-port", default=9440, show_default=True, type=click.IntRange(1, 65535))
@click.option("--http-port", default=9480, show_default=True, type=click.IntRange(1, 65535))
@click.option("--mqtt-port", default=8883, show_default=True, type=click.IntRange(1, 65535))
@click.option("--broker", default="embedded", show_default=True,
              help="embedded: mosquitto if installed, otherwise the built-in one; builtin: always the built-in "
                   "one.")  # fmt: skip
def start(  # noqa: PLR0913 - one parameter per option
    *, home: Path, parent: str, token: str, token_file: click.utils.LazyFile | None, name: str, host: str,
    address: str, grpc_port: int, http_port: int, mqtt_port: int, broker: str,
) -> None:  # fmt: skip
    """Serve until Ctrl-C or SIGTERM. The first start enrols the region with its parent.

    Devices connect to it as to a cloud: it trains with them in the cloud's jobs and sends one sum for all of them.
    """
    from cloud.region.server.enrolment import enroll_region
    from cloud.region.server.options import RegionOptions
    from cloud.region.server.process import Region
    from edgefl.logs import set_up_logging

    text = token_file.read().strip() if token_file is not None else token
    profile = enroll_region(home, parent, text, name)
    set_up_logging()
    options = RegionOptions(
        home=home, host=host, address=address, grpc_port=grpc_port, http_port=http_port, mqtt_port=mqtt_port,
        broker=broker,
    )  # fmt: skip
    Region(options, profile).serve(
        lambda url: click.echo(
            f"Region {profile.name} is ready at {url}, below {profile.parent_url}; Ctrl-C stops it.\n"
            f"  devices that should connect here:  edgefl devices assign 'PATTERN' --parents {profile.name},cloud"
        )
    )
