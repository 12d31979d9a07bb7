"""What each command of `edgefl offload` takes."""

from __future__ import annotations

import click
from click.testing import CliRunner

from edgefl.app.offload.cli import offload
from edgefl.app.offload.options import of_model


def test_a_command_gets_the_model_and_which_one_is_meant() -> None:
    seen = {}
    command = click.command()(of_model(lambda **given: seen.update(given)))
    assert CliRunner().invoke(command, ["digits", "--version", "3"]).exit_code == 0
    assert seen == {"model": "digits", "version": 3, "parameters": None, "sample": None}
    assert CliRunner().invoke(command, ["digits", "--version", "0"]).exit_code == 2


def test_every_command_has_them_but_that_of_language_models() -> None:
    context = click.Context(offload)
    for name in {*offload.list_commands(context)} - {"publish-decoder", "split-decoder"}:
        command = offload.get_command(context, name)
        assert {"model", "version", "parameters", "sample"} <= {one.name for one in command.params}, name
