"""The options by which every operator command finds its cloud: `--credentials FILE` and `--cloud URL`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from edgefl.operator.client import CloudClient

_T = TypeVar("_T")
_CLOUD = "edgefl.cloud"


@dataclass(frozen=True, slots=True)
class CloudConnection:
    """Address and credentials of a command's cloud. Nothing is opened before `open`."""

    cloud: str | None
    credentials: Path | None

    @property
    def is_chosen(self) -> bool:
        """Whether an option was given."""
        return self.cloud is not None or self.credentials is not None

    def open(self) -> CloudClient:
        """Return a client; raises ConfigError if there are no credentials."""
        from edgefl.operator.client import CloudClient, load_credentials

        return CloudClient(self.cloud, load_credentials(self.credentials))


def connected(command: Callable[..., _T]) -> Callable[..., _T]:
    """Add the options to a command, and the parameter `connection`."""
    cloud = click.option(
        "--cloud",
        metavar="URL",
        is_eager=True,  # it is read first
        expose_value=False,
        callback=_keep,
        help="The cloud's address; by default the one in the credentials.",
    )
    credentials = click.option(
        "--credentials",
        "connection",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=_connection,
        help="The operator.json of the cloud's home; by default $EDGEFL_CREDENTIALS or ~/.config/edgefl/operator.json.",
    )
    return cloud(credentials(command))


def _keep(context: click.Context, _option: click.Parameter, cloud: str | None) -> None:
    context.meta[_CLOUD] = cloud


def _connection(context: click.Context, _option: click.Parameter, credentials: Path | None) -> CloudConnection:
    return CloudConnection(context.meta.get(_CLOUD), credentials)
