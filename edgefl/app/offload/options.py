"""The argument and options that all commands of `edgefl offload` have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path, dir_okay=False)


def of_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument MODEL and the options that say which one is meant."""
    for option in (
        click.argument("model"),
        click.option("--version", type=click.IntRange(min=1), help="Of a release; by default the newest."),
        click.option("--parameters", type=FILE, help="Of a task: trained parameters; else the initial ones."),
        click.option("--sample", type=FILE, help="An .npz file with an array for each input, to run the model on."),
    )[::-1]:  # fmt: skip
        command = option(command)
    return command
