"""The `edgefl` command. Subcommands come from entry points; one whose extra is absent says which it is."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points

import click

from edgefl import __version__
from edgefl.errors import EdgeflError

_GROUP = "edgefl.commands"
_EXTRAS = {"cloud": "cloud", "agent": "agent", "simulate": "sim", "demo": "agent,train,cloud,broker,examples"}


class _Commands(click.Group):
    """Loads a subcommand when it is first asked for."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(name for name in _entries() if isinstance(_load(name), click.Command))

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _entries():
            return None
        loaded = _load(cmd_name)
        if isinstance(loaded, click.Command):
            return loaded
        extra = _EXTRAS.get(cmd_name, "train")
        raise click.ClickException(
            f"edgefl {cmd_name} needs the [{extra}] extra ({loaded}): pip install 'edgefl[{extra}]'"
        )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgefl")
def cli() -> None:
    """Federated learning from device to cloud and back: train, compress, deploy, serve, watch."""


def main() -> None:
    """Run the command line; our own errors end as one line and exit status 1, never as a traceback."""
    try:
        cli(prog_name="edgefl")
    except EdgeflError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def _load(name: str) -> click.Command | ModuleNotFoundError:
    """Return the command, or the missing module that keeps it from loading."""
    try:
        command = _entries()[name].load()
    except ModuleNotFoundError as missing:
        if missing.name is not None and missing.name.split(".")[0] in {"edgefl", "cloud", "edge_agent"}:
            raise
        return missing
    if not isinstance(command, click.Command):
        raise TypeError(f"entry point {name!r} of {_GROUP} is not a click command")
    return command
