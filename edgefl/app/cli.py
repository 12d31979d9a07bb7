"""The `edgefl` command. Its own subcommands are in a table, those of the cloud and the agent are entry points.

A subcommand is imported when it is first used; one whose extra is missing says which extra it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import click

from edgefl.errors import EdgeflError, MissingExtra
from edgefl.process.version import __version__
from edgefl.terminal import debug
from edgefl.terminal.extras import OF_COMMANDS, extra_of, install_command, missing_modules
from edgefl.terminal.output import INTERRUPTED

_GROUP = "edgefl.commands"
OWN: Mapping[str, str] = {
    "demo": "edgefl.app.demo:demo",
    "devices": "edgefl.app.commands.devices:devices",
    "jobs": "edgefl.app.commands.jobs:jobs",
    "local": "edgefl.app.local.cli:local",
    "models": "edgefl.app.commands.models:models",
    "new": "edgefl.app.commands.new:new",
    "offload": "edgefl.app.offload.cli:offload",
    "rollout": "edgefl.app.commands.models:rollout",
    "run": "edgefl.app.commands.run:run",
    "simulate": "edgefl.app.commands.simulate:simulate",
}


class _Commands(click.Group):
    """Loads a subcommand when it is first asked for."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(_entries())

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _load(cmd_name) if cmd_name in _entries() else None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a Ctrl-C that it does not handle itself ends it as in any other program."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        extra = OF_COMMANDS.get(name or "", "")
        if not {"-h", "--help"} & set(rest) and (absent := missing_modules(extra)):
            raise click.ClickException(_refusal(name or "", extra, f"it lacks {', '.join(absent)}"))
        return name, command, rest


class _Unavailable(click.Command):
    """A command that cannot be loaded: it is listed, and refused with any arguments."""

    def __init__(self, name: str, extra: str, cause: ImportError) -> None:
        super().__init__(name)
        self._text = _refusal(name, extra, str(cause))

    def parse_args(self, _ctx: click.Context, _args: list[str]) -> NoReturn:
        raise click.ClickException(self._text)


def _refusal(command: str, extra: str, seen: str) -> str:
    return f"edgefl {command} needs the [{extra}] extra ({seen}): {install_command(extra)}"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgefl")
@click.option(
    debug.FLAG,
    is_flag=True,
    expose_value=False,
    help="Show the stack trace of an error; also allowed after any command.",
    callback=lambda _ctx, _param, given: debug.ask_for() if given else None,
)
def cli() -> None:
    """Federated learning from device to cloud and back: train, compress, deploy, serve, watch."""


def main() -> None:
    """Run the command line; an error is shown as one line, with a traceback after --debug. Exit status is then 1."""
    sys.excepthook = debug.tell_unexpected
    try:
        cli(debug.taken_from(sys.argv[1:]), prog_name="edgefl")
    except EdgeflError as error:
        debug.tell(error)
        sys.exit(1)
    except ModuleNotFoundError as missing:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        extra = extra_of(missing.name, command)
        if extra is None:
            raise
        click.echo(f"error: {MissingExtra(f'edgefl {command}', extra)} ({missing})", err=True)
        sys.exit(1)


def _entries() -> dict[str, EntryPoint]:
    own = [EntryPoint(name, value, _GROUP) for name, value in OWN.items()]
    return {entry.name: entry for entry in (*entry_points(group=_GROUP), *own)}


def _load(name: str) -> click.Command:
    """Return the command, or a replacement that says which extra is missing."""
    load: Callable[[], Any] = _entries()[name].load
    extra = OF_COMMANDS.get(name, "")
    try:
        command = load()
    except ImportError as missing:
        extra = extra or extra_of(missing.name) or ""
        if not extra or (missing.name or "").partition(".")[0] in {"edgefl", "cloud", "edge_agent"}:
            raise
        command = _Unavailable(name, extra, missing)
    if not isinstance(command, click.Command):
        raise TypeError(f"entry point {name!r} of {_GROUP} is not a click command")
    if isinstance(command, _Unavailable) or missing_modules(extra):
        command.short_help = f"(needs the [{extra}] extra) {command.get_short_help_str()}"
    return command
