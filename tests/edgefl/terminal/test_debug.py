"""One line that says whose fault it is; the stack where it is asked for, also of what happens in other processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgefl.errors import TaskError
from edgefl.task import UserCode
from edgefl.terminal import debug


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debug.VARIABLE, "0")  # so that what a test asks for ends with it


def fail() -> None:
    with UserCode("mine", "its loader"):
        raise KeyError("label")


def caught() -> TaskError:
    with pytest.raises(TaskError) as told:
        fail()
    return told.value


def test_the_flag_is_taken_wherever_it_stands_before_the_end_of_options() -> None:
    assert debug.taken_from(["run", "task", "--debug", "--json", "-"]) == ["run", "task", "--json", "-"]
    assert debug.wanted()
    os.environ[debug.VARIABLE] = ""
    assert debug.taken_from(["run", "--", "--debug"]) == ["run", "--", "--debug"]
    assert not debug.wanted()


def test_without_it_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    debug.tell(caught())
    assert capsys.readouterr().err.splitlines() == [
        f"error: task 'mine': its loader raised KeyError: 'label' ({__file__}:{fail.__code__.co_firstlineno + 2})"
    ]


def test_with_it_the_stack_is_shown_once_at_the_border_that_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    debug.ask_for()
    error = caught()
    assert "in fail" in capsys.readouterr().err
    debug.tell(error)
    assert capsys.readouterr().err.startswith("error: task 'mine'")
    debug.tell(TaskError("of another process"))
    assert "TaskError: of another process" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["before", "after", "never"])
def test_what_nobody_meant_is_told_as_ours(place: str) -> None:
    program = (
        "import click, sys; from edgefl.app import cli\n"
        "@click.command()\n"
        "def broken(): {}['nothing']\n"
        "cli._load = lambda name: broken; cli._entries = lambda: {'broken': None}\n"
        "cli.main()"
    )
    words = {"before": ["--debug", "broken"], "after": ["broken", "--debug"], "never": ["broken"]}[place]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == (place != "never")
    if place == "never":
        [line] = done.stderr.splitlines()
        assert line.startswith("error: a fault of edgefl itself, not of your task or settings: KeyError: 'nothing' (")
        assert line.endswith("--debug shows the stack")


def test_an_error_moves_no_cursor(capsys):
    debug.tell(TaskError("first\nsecond \x1b[2J"))
    debug.tell_unexpected(ValueError, ValueError("a\nforged\x1b"), None)
    first, second, third = capsys.readouterr().err.splitlines()
    assert (first, second) == ("error: first", "second \\x1b[2J")
    assert "ValueError: a forged\\x1b" in third
