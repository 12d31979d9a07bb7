"""The command line: help and refusals are never a traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from edgefl import __version__
from edgefl.app import cli
from edgefl.errors import ConfigError


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, EntryPoint]]:
    """Entry points of our own: one that works, one that raises, one whose extra is absent."""
    module = ModuleType("commands_of_this_test")

    @click.command()
    def works() -> None:
        """Say yes."""
        click.echo("yes")

    @click.command()
    def raises() -> None:
        raise ConfigError("rounds.count=0 must be 1 or more")

    @click.command()
    def stopped() -> None:
        raise KeyboardInterrupt

    module.works, module.raises, module.stopped, module.nothing = works, raises, stopped, 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = {
        name: EntryPoint(name, f"{home}:{name}", "edgefl.commands")
        for name, home in {
            "works": module.__name__, "raises": module.__name__, "stopped": module.__name__, "nothing": module.__name__,
            "cloud": "a_module_that_no_extra_brings", "own": "edgefl.no_such_module",
        }.items()
    }  # fmt: skip
    monkeypatch.setattr(cli, "_entries", lambda: found)
    return found


def test_help_lists_what_is_there(entries: dict[str, EntryPoint]) -> None:
    del entries["nothing"], entries["own"]
    result = CliRunner().invoke(cli.cli, ["--help"])
    assert result.exit_code == 0
    assert "Say yes." in result.output
    assert re.search(r"cloud +\(needs the \[cloud\] extra\)", result.output)


def test_a_command_runs(entries: dict[str, EntryPoint]) -> None:
    assert CliRunner().invoke(cli.cli, ["works"]).output == "yes\n"


def test_a_ctrl_c_ends_every_command_as_shells_count_it(entries: dict[str, EntryPoint]) -> None:
    result = CliRunner(mix_stderr=False).invoke(cli.cli, ["stopped"])
    assert (result.exit_code, result.stderr) == (130, "\ninterrupted\n")


def test_an_absent_extra_is_named_with_the_line_that_brings_it(entries: dict[str, EntryPoint]) -> None:
    result = CliRunner().invoke(cli.cli, ["cloud", "start"])
    assert result.exit_code == 1
    assert "edgefl cloud needs the [cloud] extra (No module named 'a_module_that_no_extra_brings')" in result.output
    assert f"{sys.executable} -m pip install" in result.output
    assert "[cloud]'" in result.output


def test_a_missing_module_of_our_own_is_a_fault_and_no_missing_extra(entries: dict[str, EntryPoint]) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        CliRunner().invoke(cli.cli, ["own"], catch_exceptions=False)


def test_an_entry_that_is_no_command_is_a_fault(entries: dict[str, EntryPoint]) -> None:
    with pytest.raises(TypeError, match=r"'nothing' of edgefl\.commands is not a click command"):
        CliRunner().invoke(cli.cli, ["nothing"], catch_exceptions=False)


def test_an_unknown_command_is_named(entries: dict[str, EntryPoint]) -> None:
    result = CliRunner().invoke(cli.cli, ["wroks"])
    assert result.exit_code == 2
    assert "No such command 'wroks'" in result.output


def test_our_own_errors_are_one_line(
    entries: dict[str, EntryPoint], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["edgefl", "raises"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: rounds.count=0 must be 1 or more\n"


def test_the_real_command_answers_without_traceback() -> None:
    for option, wanted in (("--help", "Usage: edgefl"), ("--version", __version__)):
        done = subprocess.run(
            [sys.executable, "-m", "edgefl", option], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
        assert wanted in done.stdout
