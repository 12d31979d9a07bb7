"""Hints name what the user can run: where edgefl came from decides."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from edgefl.app.cli import OWN
from edgefl.terminal import extras

ROOT = Path(__file__).parents[3]


def command_from(monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any], extra: str = "sim") -> str:
    monkeypatch.setattr(extras, "_origin", lambda: origin)
    return extras.install_command(extra).removeprefix(f"{sys.executable} -m pip install ")


def test_a_clone_is_named_by_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_from(monkeypatch, {"url": ROOT.as_uri(), "dir_info": {}}) == f"'{ROOT}[sim]'"
    assert command_from(monkeypatch, {"url": ROOT.as_uri(), "dir_info": {"editable": True}}) == f"-e '{ROOT}[sim]'"


def test_a_clone_that_is_gone_is_not_named_as_if_it_were_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = command_from(monkeypatch, {"url": (tmp_path / "a b").as_uri(), "dir_info": {}})
    assert said == f"'.[sim]' (in a clone of edgefl; the one at {tmp_path / 'a b'} is gone)"


def test_a_repository_a_file_and_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    git = {"url": "https://example.org/edgefl.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    assert command_from(monkeypatch, git) == "'edgefl-fleet[sim] @ git+https://example.org/edgefl.git@abc'"
    wheel = {"url": "file:///tmp/edgefl_fleet-0.1.0-py3-none-any.whl", "archive_info": {}}
    assert command_from(monkeypatch, wheel) == f"'edgefl-fleet[sim] @ {wheel['url']}'"
    assert command_from(monkeypatch, {}) == "'edgefl-fleet[sim]'"


def test_this_installation_has_an_origin() -> None:
    assert str(ROOT) in extras.install_command("cloud")


def test_of_several_extras_the_commands_own_is_named() -> None:
    assert extras.extra_of("grpc.aio") == "agent"
    assert extras.extra_of("grpc.aio", "cloud") == "cloud"
    assert extras.extra_of("torch", "cloud") == "train"
    assert extras.extra_of("a_module_of_the_user") is None
    assert extras.extra_of(None) is None


@pytest.mark.parametrize("module", extras.OF_MODULES)
def test_each_extra_brings_what_is_said_of_it(module: str) -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    names = {name.lower() for name in packages_distributions()[module]}
    for extra in extras.OF_MODULES[module]:
        brought = {re.split(r"[<>=\[; ]", one)[0].lower() for one in asked[extra]}
        brought |= {"starlette"} if "fastapi" in brought else set()
        assert names & brought, f"[{extra}] does not bring {module}"


def test_what_an_extra_lacks_is_named_without_importing_it() -> None:
    assert extras.missing_modules("agent,train,cloud,sim") == []
    script = "import sys, edgefl.terminal.extras as e; print(e.missing_modules('train'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["[]", "False"]
    bare = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, timeout=60, check=True,
                          env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert "torch" in bare.stdout


@pytest.mark.parametrize("command", extras.OF_COMMANDS)
def test_the_extras_of_a_command_exist(command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.OF_COMMANDS[command].split(",")) <= project["optional-dependencies"].keys()
    assert command in {*project["entry-points"]["edgefl.commands"], *OWN}


def test_no_text_of_ours_names_the_other_project() -> None:
    files = [path for pattern in ("*.py", "*.md", "*.service") for path in ROOT.rglob(pattern)]
    ours = [path for path in files if not path.relative_to(ROOT).parts[0].startswith(".")]
    wrong = "pip install " + "'edgefl["
    assert [str(path) for path in ours if wrong in path.read_text(encoding="utf-8")] == []
