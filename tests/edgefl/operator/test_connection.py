"""How a command finds its cloud."""

from __future__ import annotations

import click
from click.testing import CliRunner

from edgefl.errors import ConfigError
from edgefl.operator.connection import connected


@click.command()
@connected
def where(connection):
    with connection.open() as client:
        click.echo(client.url)


def test_the_credentials_name_the_cloud_and_an_option_another(http_plane):
    credentials = str(http_plane.credentials)
    assert CliRunner().invoke(where, ["--credentials", credentials]).output == f"{http_plane.url}\n"
    other = CliRunner().invoke(where, ["--credentials", credentials, "--cloud", "https://h:1/"])
    assert other.output == "https://h:1\n"


def test_without_credentials_it_says_how_to_get_them(tmp_path):
    done = CliRunner().invoke(where, [], env={"EDGEFL_CREDENTIALS": str(tmp_path / "none.json")})
    assert isinstance(done.exception, ConfigError)
    assert "edgefl cloud start" in str(done.exception)
