"""`edgefl devices`: list, remove."""

from __future__ import annotations

import click

from edgefl.app.commands.log_text import LINES, print_log
from edgefl.operator.client import Json
from edgefl.operator.connection import CloudConnection, connected
from edgefl.terminal.output import Output, example, json_option, time_text


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
    output.table(
        columns, rows, "no device is enrolled; `edgefl cloud token` makes a token for one",
        whole=("name", "serving"), spare=("enrolled", "cpu", "free disk", "free memory", "tags"),
    )  # fmt: skip
    output.result(found)


@devices.command(epilog=example("edgefl devices remove cam-1"))
@click.argument("name")
@connected
@json_option
def remove(name: str, connection: CloudConnection, output: Output) -> None:
    """Remove a device and reject its certificate from now on."""
    with connection.open() as client:
        client.remove_device(name)
    output.line(f"device {name} is removed from the fleet")
    output.result({"removed": name})


@devices.command(epilog=example("edgefl devices logs cam-1 --lines 50"))
@click.argument("name")
@LINES
@connected
@json_option
def logs(name: str, num_lines: int, connection: CloudConnection, output: Output) -> None:
    """Show the end of a device's own log, which the device uploads now; at most 256 kB.

    The device keeps the log of its agent, also over restarts, as agent.log in its home.
    """
    with connection.open() as client:
        found = client.device_log(name, num_lines)
    print_log(found, output)
    output.result(found)


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
