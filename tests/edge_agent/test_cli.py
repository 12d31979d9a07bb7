"""`edgefl agent`: help with an example everywhere, and options that are checked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from edge_agent.cli import _located, _shown, agent
from edgefl.errors import ConfigError, HomeError

COMMANDS = ("doctor", "enroll", "install", "start", "status", "uninstall")


def test_all_commands_are_listed():
    shown = CliRunner().invoke(agent, ["--help"]).output
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = CliRunner().invoke(agent, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output


@pytest.mark.parametrize(("option", "value"), [("--data", "part"), ("--data", "=1")])
def test_a_pair_that_is_none(tmp_path, option, value):
    result = CliRunner().invoke(agent, ["start", "--home", str(tmp_path), option, value])
    assert isinstance(result.exception, ConfigError)
    assert f"{option} {value!r} is not of the form key=value" in str(result.exception)


def test_a_home_that_is_not_enrolled_ends_with_one_line(tmp_path):
    command = [sys.executable, "-m", "edgefl", "agent", "start", "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "`edgefl agent enroll` makes one" in done.stderr


def test_status_in_words(home):
    result = CliRunner().invoke(agent, ["status", "--home", str(home)])
    assert result.exit_code == 1  # it does not run
    assert "device               cam-1" in result.output
    assert "last contact         -" in result.output
    assert isinstance(CliRunner().invoke(agent, ["status", "--home", str(home.parent)]).exception, HomeError)


def test_models_and_their_placements_in_words():
    assert _shown({"digits": 3, "cnn": 1}) == "cnn:1 digits:3"
    assert _shown({"digits": "device, 3 here", "cnn": "cloud fp16"}) == "cnn: cloud fp16; digits: device, 3 here"


def test_start_imports_little():
    script = "import sys, edge_agent.agent; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "onnxruntime", "fastapi", "pydantic", "rich", "httpx", "edgefl.trees"}
    assert heavy.isdisjoint(loaded)


def test_a_relative_path_of_the_data_is_where_the_agent_was_started(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "0").mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"path": "./pictures", "part": "0", "url": "s3://bucket/x", "absolute": "/proc"}
    assert _located(options) == options | {"path": str(tmp_path / "pictures")}


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "give the token once"), (["--token", "t", "--token-file", "-"], "give the token once"),
     (["--token-file", "-"], "--token-file is empty")],
)  # fmt: skip
def test_a_token_is_given_once(tmp_path, options, said):
    arguments = ["enroll", "--home", str(tmp_path / "h"), "--cloud", "https://127.0.0.1:1", "--name", "a", *options]
    result = CliRunner().invoke(agent, arguments)
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


def test_a_token_comes_from_stdin(tmp_path):
    arguments = ["enroll", "--home", str(tmp_path), "--cloud", "https://127.0.0.1:1", "--name", "a"]
    result = CliRunner().invoke(agent, [*arguments, "--token-file", "-"], input="not.a.token\n")
    assert "the token is not of the form efl1" in str(result.exception)
