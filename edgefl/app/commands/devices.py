"""`edgefl devices`: list, remove."""

from __future__ import annotations

from pathlib import Path

import click

from edgefl.app.commands.log_text import LINES, print_log
from edgefl.operator.client import Json
from edgefl.operator.connection import CloudConnection, connected
from edgefl.operator.tree import FleetNode, fleet_tree, tree_lines
from edgefl.terminal.output import Output, counted, example, json_option, refuse_no_folder, time_text

TREE_PLOT = click.option(
    "--plot", "path", type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw the tree: png, svg, pdf, ...",
)  # fmt: skip


def show_tree(root: FleetNode, path: Path | None, output: Output) -> None:
    """Print a tree, and draw it if there is a path."""
    if path is not None:
        from edgefl.simulation.screen.tree_plot import write_tree_plot

        refuse_no_folder(path, "--plot")
        write_tree_plot(root, path)
    for line in tree_lines(root):
        output.line(line)
    if path is not None:
        output.line(f"plot: {path}")


class _WithTree(click.Group):
    """`devices --tree` is `devices tree`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["tree", *args[1:]] if args[:1] == ["--tree"] else args)


@click.group(cls=_WithTree)
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
        (one["name"], "online" if one["online"] else "offline", one.get("via", ""),
         _pairs(one["models"], ":"), _pairs(one["tags"], "="), *_telemetry(one.get("telemetry")),
         one["serving_url"], time_text(one["enrolled_s"]))
        for one in found
    ]  # fmt: skip
    columns = ("name", "state", "region", "models", "tags", "cpu", "free memory", "free disk", "serving", "enrolled")
    output.table(
        columns, rows, "no device is enrolled; `edgefl cloud token` makes a token for one",
        whole=("name", "serving"), spare=("enrolled", "cpu", "free disk", "free memory", "tags"),
    )  # fmt: skip
    output.result(found)


@devices.command(epilog=example("edgefl devices tree", "edgefl devices tree --plot fleet.png"))
@TREE_PLOT
@connected
@json_option
def tree(path: Path | None, connection: CloudConnection, output: Output) -> None:
    """Show the fleet as a tree: the cloud, regions, and their devices. `edgefl devices --tree` is the same.

    Of a region: the bytes of models, updates and sums since its start.
    """
    with connection.open() as client:
        root = fleet_tree(client.regions(), client.devices())
    show_tree(root, path, output)
    output.result(root.as_json())


@devices.command(epilog=example("edgefl devices assign 'cam-*' --parents oslo,bergen,cloud"))
@click.argument("pattern")
@click.option("--parents", required=True, metavar="NAMES",
              help="Regions, or cloud, divided by commas: a device connects to the first that it reaches.")  # fmt: skip
@connected
@json_option
def assign(pattern: str, parents: str, connection: CloudConnection, output: Output) -> None:
    """Set where the devices whose names match PATTERN connect; * and ? are as in a shell.

    A device leaves a parent that does not answer for the next in the list, and comes back.
    """
    with connection.open() as client:
        done = client.assign_devices(pattern, [one.strip() for one in parents.split(",") if one.strip()])
    output.line(f"{counted(len(done['devices']), 'device')} -> {', '.join(done['parents'])}")
    output.result(done)


@devices.command(epilog=example("edgefl devices remove cam-1"))
@click.argument("name")
@connected
@json_option
def remove(name: str, connection: CloudConnection, output: Output) -> None:
    """Remove a device, or a region, and reject its certificate from now on.

    A region can be removed when no region is below it, and every device has another parent.
    """
    with connection.open() as client:
        removed = client.remove_device(name)
    output.line(f"{name} is removed from the fleet")
    if moved := removed.get("reassigned"):
        output.line(f"{counted(len(moved), 'device')} had it as a parent, and use their others")
    output.result(removed)


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
