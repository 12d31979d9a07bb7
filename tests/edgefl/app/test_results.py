"""Every command that yields a result writes it as JSON; the shell completes commands and options."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from docs.generate.commands import leaves
from edgefl.app.cli import cli

# Their results are those of `agent status`, `cloud status`, `devices tree` and `local status`.
RUN_UNTIL_STOPPED = {
    "edgefl agent join", "edgefl agent start", "edgefl cloud generate", "edgefl cloud stages", "edgefl cloud start",
    "edgefl cloud train-stage", "edgefl local hold", "edgefl region start",
}  # fmt: skip


def test_every_command_that_yields_a_result_writes_it_as_json() -> None:
    without = {
        context.command_path
        for command, context in leaves(cli, click.Context(cli, info_name="edgefl"))
        if "--json" not in {name for one in command.params for name in one.opts}
    }
    assert without == RUN_UNTIL_STOPPED


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["edgefl", "jo"], ["jobs"]),
        (["edgefl", "jobs", "c"], ["cancel", "compare"]),
        (["edgefl", "jobs", "show", "--j"], ["--json"]),
        (["edgefl", "simulate", "--engine", "p"], ["pool"]),
    ],
    ids=" ".join,  # the ids must not hang on the order of a set, else two workers collect differently
)
def test_bash_completes_commands_options_and_choices(words: list[str], found: list[str]) -> None:
    script = (
        f'eval "$(_EDGEFL_COMPLETE=bash_source edgefl)"; COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; '
        'COMPREPLY=(); _edgefl_completion edgefl; echo "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=100, check=True, env={"PATH": path}
    )
    assert sorted(done.stdout.split()) == found
