"""`edgefl cloud`: start the cloud, look at it, make and revoke enrolment tokens, configure an external broker."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloud.generation.cli import generate
from cloud.split.cli import train_stage
from cloud.stages.cli import stages
from edgefl.terminal.output import Output, example, json_option, time_text

if TYPE_CHECKING:
    import sqlalchemy as sa

HOME = click.option(
    "--home", type=click.Path(path_type=Path), required=True, help="The cloud's folder: keys, database, models."
)


@click.group()
def cloud() -> None:
    """Run the cloud of a fleet."""


cloud.add_command(generate)
cloud.add_command(stages)
cloud.add_command(train_stage)


@cloud.command(
    epilog=example("edgefl cloud start --home /var/lib/edgefl-cloud --host 0.0.0.0 --name cloud.example.org")
)
@HOME
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--grpc-port", default=9440, show_default=True, type=click.IntRange(1, 65535))
@click.option("--http-port", default=9480, show_default=True, type=click.IntRange(1, 65535))
@click.option("--mqtt-port", default=8883, show_default=True, type=click.IntRange(1, 65535), help="Own broker's.")
@click.option("--broker", default="embedded", show_default=True,
              help="embedded: the cloud's own, which is mosquitto if installed, otherwise the built-in one; builtin: "
                   "always the built-in one; or the URL of another broker, mqtts://HOST:PORT.")  # fmt: skip
@click.option("--broker-pid-file", type=click.Path(path_type=Path),
              help="Of a mosquitto on this machine, to which the cloud sends SIGHUP to reload certificates. "
                   "[default: HOME/mosquitto/mosquitto.pid]")  # fmt: skip
@click.option("--name", "names", multiple=True, help="Another name or address at which devices reach this cloud.")
@click.option("--certificate-days", default=397.0, show_default=True, type=click.FloatRange(0.001, 3650),
              help="Lifetime of certificates. Each is renewed automatically when a third of it is left.")  # fmt: skip
@click.option("--kept-rounds", default=1000, show_default=True, type=click.IntRange(10, 10_000_000),
              help="How many of a job's latest rounds to keep for `edgefl jobs show`.")  # fmt: skip
@click.option("--kept-models", default=3, show_default=True, type=click.IntRange(1, 100_000),
              help="How many of a job's latest models to keep for evaluation and `edgefl run --resume`.")  # fmt: skip
@click.option("--insecure", is_flag=True, help="No TLS. For loopback only.")
def start(  # noqa: PLR0913 - one parameter per option
    *, home: Path, host: str, grpc_port: int, http_port: int, mqtt_port: int, broker: str,
    broker_pid_file: Path | None, names: tuple[str, ...], certificate_days: float, kept_rounds: int,
    kept_models: int, insecure: bool,
) -> None:  # fmt: skip
    """Serve until Ctrl-C or SIGTERM. The first start creates the CA, the fleet's key and HOME/operator.json."""
    from cloud.aggregator import Aggregator
    from cloud.state.home import AggregatorOptions
    from edgefl.logs import set_up_logging

    options = AggregatorOptions(
        home=home,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        mqtt_port=mqtt_port,
        broker=broker,
        broker_pid_file=broker_pid_file,
        certificate_days=certificate_days,
        kept_rounds=kept_rounds,
        kept_models=kept_models,
        insecure=insecure,
        names=names,
    )
    set_up_logging()
    Aggregator(options).serve(lambda url: click.echo(_next_steps(home, url)))


def _next_steps(home: Path, url: str) -> str:
    return (
        f"The cloud is ready at {url}; Ctrl-C stops it.\n"
        f"  a token to enrol a device:  edgefl cloud token --home {home}\n"
        f"  operator's credentials:     {home / 'operator.json'} (copy to ~/.config/edgefl/, or name by --credentials)"
    )


@cloud.command(epilog=example("edgefl cloud token --home /var/lib/edgefl-cloud --valid-for 3600"))
@HOME
@click.option("--valid-for", "valid_for_s", default=24 * 3600.0, show_default=True, help="Seconds.")
@click.option("--label", help="What the token is for, shown by `edgefl cloud tokens list`.")
@click.option("--role", type=click.Choice(["device", "region"]), default="device", show_default=True)
@json_option
def token(home: Path, valid_for_s: float, label: str | None, role: str, output: Output) -> None:
    """Print a one-time token that enrols one device, or one region. Works whether or not the cloud runs."""
    from cloud.state.enrolment import Enrolment

    with _database(home) as engine:
        text = Enrolment(engine, home / "tls").new_token(valid_for_s, label, role)
    output.line(text)
    output.result({"token": text, "valid_for_s": valid_for_s})


@cloud.group()
def tokens() -> None:
    """Enrolment tokens: list and revoke. They are named by an id; a token itself is never shown again."""


@tokens.command("list", epilog=example("edgefl cloud tokens list --home /var/lib/edgefl-cloud"))
@HOME
@json_option
def list_tokens(home: Path, output: Output) -> None:
    """List every token, the newest first. Works whether or not the cloud runs."""
    from cloud.state.enrolment_tokens import EnrolmentTokens

    with _database(home) as engine:
        found = EnrolmentTokens(engine).list()
    rows = [
        (one.id, one.state, one.label, one.used_by, time_text(one.made_s), time_text(one.expires_s)) for one in found
    ]
    columns = ("id", "state", "label", "device", "made", "expires")
    output.table(columns, rows, "no token; `edgefl cloud token` makes one", whole=("id", "device"), spare=("made",))
    output.result([dataclasses.asdict(one) for one in found])


@tokens.command(epilog=example("edgefl cloud tokens revoke 3f9a0c --home /var/lib/edgefl-cloud"))
@click.argument("token_id", metavar="TOKEN")
@HOME
@json_option
def revoke(token_id: str, home: Path, output: Output) -> None:
    """Revoke a token that no device has used. TOKEN is its id, the beginning of its id, or its label."""
    from cloud.state.enrolment_tokens import EnrolmentTokens

    with _database(home) as engine:
        revoked = EnrolmentTokens(engine).revoke(token_id)
    output.line(f"token {revoked.id} is revoked")
    output.result(dataclasses.asdict(revoked))


@cloud.command(epilog=example("edgefl cloud status --home /var/lib/edgefl-cloud --json -"))
@HOME
@json_option
def status(home: Path, output: Output) -> None:
    """Show whether the cloud runs and is healthy: parts, ports, devices, jobs, disk, certificates.

    Exit status 0 only if it runs and all its parts are healthy.
    """
    from cloud.status import read_cloud_status

    found = read_cloud_status(home)
    for name, value in dataclasses.asdict(found).items():
        output.line(f"{name.replace('_', ' '):20} {_shown(name, value)}")
    output.result(dataclasses.asdict(found))
    if not found.healthy:
        raise click.exceptions.Exit(1)


def _shown(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = ", ".join(f"{key} {one or 'ok'}" if name == "parts" else f"{key} {one}" for key, one in value.items())
    return f"{value:.0f}" if isinstance(value, float) else str(value) or "-"


@contextmanager
def _database(home: Path) -> Iterator[sa.Engine]:
    """Open the database of a cloud's home; raises HomeError if the folder is none."""
    from cloud.state.store import open_database
    from edgefl.process.home import check_home

    check_home(home, "cloud")
    engine = open_database(home / "cloud.db")
    try:
        yield engine
    finally:
        engine.dispose()


@cloud.command(
    "broker-config",
    epilog=example(
        "edgefl cloud broker-config --home /var/lib/edgefl-cloud --host 0.0.0.0 --name broker.example.org",
        "mosquitto -c /var/lib/edgefl-cloud/mosquitto/mosquitto.conf",
        "edgefl cloud start --home /var/lib/edgefl-cloud --broker mqtts://broker.example.org:8883",
    ),
)
@HOME
@click.option("--host", default="127.0.0.1", show_default=True, help="Address that mosquitto listens on.")
@click.option("--port", default=8883, show_default=True, type=click.IntRange(1, 65535))
@click.option("--name", "names", multiple=True, help="Another name or address at which devices reach the broker.")
@json_option
def broker_config(home: Path, host: str, port: int, names: tuple[str, ...], output: Output) -> None:
    """Write the files for an external mosquitto.

    HOME/mosquitto then has its configuration, access rights, key and certificate.
    """
    from cloud.broker.mosquitto_config import CRL_FILE, PID_FILE, write_broker_config
    from cloud.state.enrolment import Enrolment
    from cloud.state.store import open_database
    from edgefl.process.home import create_home, replace_file
    from edgefl.protocols.tls import BROKER_NAME, Identity, create_ca, issue_server

    create_home(home, "cloud")
    keys, folder = home / "tls", (home / "mosquitto").resolve()
    for one in (keys, folder):
        one.mkdir(mode=0o700, exist_ok=True)
    if not (keys / "ca.pem").exists():
        create_ca(keys)
    identity = Identity.in_folder(folder)
    shutil.copyfile(keys / "ca.pem", identity.ca)
    hosts = {host, "localhost", "127.0.0.1", socket.gethostname(), *names} - {"0.0.0.0", "::"}  # noqa: S104 - not bound
    issue_server(keys, identity, sorted(hosts), BROKER_NAME)
    engine = open_database(home / "cloud.db")
    replace_file(folder / CRL_FILE, Enrolment(engine, keys).crl())
    engine.dispose()
    path = write_broker_config(folder, host, port)
    output.line(f"wrote {path}; start it with: mosquitto -c {path}")
    output.line(
        "On this machine, `edgefl cloud start` sends it SIGHUP to reload the revoked certificates, if permitted. "
        f"Run both as the same user, and if mosquitto's pid is not in {folder / PID_FILE}, pass --broker-pid-file. On "
        "another machine, use deploy/mosquitto/edgefl-crl.timer."
    )
    if os.geteuid() == 0:
        output.line(
            "If root starts mosquitto, it runs as the user mosquitto, who cannot read this folder: add the line "
            "`user root` to mosquitto.conf, or run the cloud and the broker as a separate user."
        )
    output.result({"config": str(path)})
