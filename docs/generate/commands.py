"""The command reference, from the click commands: usage, help, options, examples."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator

import click

from docs.generate.markdown import fenced, prose, table
from edgefl.app.cli import cli
from edgefl.terminal.extras import OF_COMMANDS

HEAD = """# Commands

`edgefl COMMAND --help` shows the same on the command line. `--debug`, before or after any command, shows the stack
trace of an error. Commands that have `--json FILE` write their result there; `--json -` writes it to stdout.
"""


def leaves(group: click.Group, parent: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield each command that does something, with its context; groups are followed to their commands."""
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        if command is None:
            raise LookupError(f"{parent.command_path} lists {name!r} and does not have it")
        context = click.Context(command, info_name=name, parent=parent)
        if isinstance(command, click.Group):
            yield from leaves(command, context)
        else:
            yield command, context


def page() -> str:
    """Return the page."""
    parts, group = [HEAD], ""
    for command, context in leaves(cli, click.Context(cli, info_name="edgefl")):
        top = context.command_path.split()[1]
        if top != group:
            group = top
            parts.append(f"## edgefl {top}")
            if context.parent is not None and context.parent.command is not cli:
                parts.append(_help(context.parent.command))
            if extra := OF_COMMANDS.get(top):
                parts.append(f"Needs `pip install '.[{extra}]'`.")
        if context.command_path != f"edgefl {top}":
            parts.append(f"### {context.command_path}")
        parts.extend(_described(command, context))
    return "\n\n".join(parts) + "\n"


def _described(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    yield fenced(usage, "text")
    yield _help(command)
    records = [
        record
        for one in command.get_params(context)
        if "--help" not in one.opts and (record := one.get_help_record(context)) is not None
    ]
    if records:
        rows = [(f"`{option}`", prose(" ".join(text.split()))) for option, text in records]
        yield table(("option", "what it does"), rows)
    for part in filter(None, (command.epilog or "").replace("\b\n", "").split("\n\n")):
        title, _, lines = part.partition("\n")
        text = textwrap.dedent(lines)
        yield fenced(text, "sh") if title == "Example:" else f"{title}\n\n{fenced(text, 'text')}"


def _help(command: click.Command) -> str:
    return prose(inspect.cleandoc(command.help or "").replace("\b\n", ""))
