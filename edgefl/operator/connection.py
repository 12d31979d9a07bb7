"""How every operator's command finds its cloud: `--credentials FILE` and `--cloud URL`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from edgefl.operator.client import CloudClient, load_credentials

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a command's cloud is. Nothing is opened before `open`."""

    cloud: str | None
    credentials: Path | None

    def open(self) -> CloudClient:
        """Return a client; raises ConfigError where there are no credentials."""
        return CloudClient(self.cloud, load_credentials(self.credentials))


def connected(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command the options and the parameter `connection`."""

    @click.option("--cloud", metavar="URL", help="The cloud's address; by default the one in the credentials.")
    @click.option(
        "--credentials",
        type=click.Path(path_type=Path, dir_okay=False),
        help="The operator.json of the cloud's home; by default $EDGEFL_CREDENTIALS or ~/.config/edgefl/operator.json.",
    )
    @functools.wraps(command)
    def with_connection(*arguments: Any, cloud: str | None, credentials: Path | None, **options: Any) -> _T:
        return command(*arguments, connection=Connection(cloud, credentials), **options)

    return with_connection
