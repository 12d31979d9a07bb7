"""`edgefl local`: a fleet on this machine, to try commands on."""

from __future__ import annotations

from pathlib import Path

import click

from edgefl.app.local.holder import LocalState, hold, running, start, stop
from edgefl.operator.credentials import local_home
from edgefl.process.home import home_in_use
from edgefl.terminal.output import Output, example, json_option

MAX_DEVICES, MAX_REGIONS = 32, 8
NOT_RUNNING = 3  # exit status of `status`, as of `systemctl status`
HOME = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    default=local_home,
    show_default="~/.local/state/edgefl/local",
    help="The fleet's folder.",
)


@click.group()
def local() -> None:
    """A cloud and devices on this machine, as real processes over TLS; they run until they are stopped.

    Without other credentials, every command uses this fleet.
    """


@local.command("start", epilog=example("edgefl local start", "edgefl local start --devices 5"))
@click.option("--devices", default=3, show_default=True, type=click.IntRange(1, MAX_DEVICES), help="Number of devices.")
@click.option("--regions", type=click.IntRange(0, MAX_REGIONS), help="Regions above the devices. [default: none]")
@HOME
@json_option
def start_local(*, devices: int, regions: int | None, home: Path, output: Output) -> None:
    """Start the fleet in the background. Device i of N has the data options part=i and parts=N.

    With --regions, device i is below region i modulo their number, and the regions are below the cloud.
    """
    if not home_in_use(home):
        between = f"{regions} regions and " if regions else ""
        output.line(f"start a cloud, {between}{devices} devices" if between else f"start a cloud and {devices} devices")
    tell(start(home, devices, regions), output)


@local.command(epilog=example("edgefl local status --json -"))
@HOME
@json_option
def status(*, home: Path, output: Output) -> None:
    """Show whether the fleet runs; the exit status is 3 if it does not."""
    found = running(home)
    if found is None:
        output.line("no local fleet is running; `edgefl local start` starts one")
        output.result({"running": False})
        raise click.exceptions.Exit(NOT_RUNNING)
    tell(found, output)


@local.command("stop", epilog=example("edgefl local stop"))
@HOME
@json_option
def stop_local(*, home: Path, output: Output) -> None:
    """End the fleet. Its jobs, releases and devices are kept for the next start."""
    was_running = stop(home)
    output.line("the local fleet is stopped" if was_running else "no local fleet is running")
    output.result({"stopped": was_running})


@local.command("hold", hidden=True)
@click.option("--devices", required=True, type=click.IntRange(1, MAX_DEVICES))
@click.option("--ready", required=True, type=int)
@click.option("--regions", type=click.IntRange(0, MAX_REGIONS))
@HOME
def hold_local(*, devices: int, ready: int, regions: int | None, home: Path) -> None:
    """Hold the fleet in this process."""
    hold(home, devices, ready, regions)


def tell(state: LocalState, output: Output) -> None:
    """Print where cloud and devices are."""
    output.line(f"cloud: {state.url}, credentials {state.credentials}")
    for name, url in state.regions.items():
        output.line(f"{name}: {url}")
    for name, url in state.devices.items():
        output.line(f"{name}: predictions at {url}")
    output.result(
        {"running": True, "url": state.url, "credentials": state.credentials, "devices": state.devices,
         "regions": state.regions}
    )  # fmt: skip
