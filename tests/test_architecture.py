"""The house keeps its shape: who imports whom, how light a door is, how long a file, and that each has its test."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import edgefl

ROOT = Path(__file__).parents[1]
PACKAGES = ("edgefl", "cloud", "edge_agent")
MAX_LINES = 400
HEAVY = {"torch", "flwr", "grpc", "onnx", "onnxruntime", "onnxscript", "fastapi", "sqlalchemy", "amqtt", "paho", "ray"}


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if "_pb2" not in path.name)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules() -> list[Path]:
    return [path for path in sources(*PACKAGES) if path.stem not in {"__init__", "__main__"}]


def test_import_contracts_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("edgefl", set()),
        ("edgefl.app.cli", set()),
        ("edgefl.rounds", set()),
        ("edgefl.aggregation.server_opt", set()),
        ("edgefl.models.manifest", set()),
        ("edgefl.protocols.messages", set()),
        ("edgefl.protocols.tls", set()),
        ("edgefl.task", set()),
        ("edge_agent.cli", set()),
        ("edge_agent.install.service", set()),
        ("edge_agent.install.doctor", set()),
        ("edge_agent.agent", {"grpc", "paho"}),  # an idle agent is small: no torch, and no model until there is one
    ],
)
def test_what_an_import_loads(module: str, allowed: set[str]) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert {name.partition(".")[0] for name in done.stdout.split()} & HEAVY <= allowed


def test_no_source_file_is_too_long() -> None:
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*PACKAGES, "benchmarks", "examples", "tests")
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_module_has_its_test() -> None:
    wanted = {relative(path): f"tests/{path.parent.relative_to(ROOT)}/test_{path.name}" for path in modules()}
    assert [f"{name} has no {test}" for name, test in wanted.items() if not (ROOT / test).exists()] == []


def test_every_file_says_what_it_is() -> None:
    silent = [
        relative(path)
        for path in sources(*PACKAGES)
        if path.name != "__main__.py" and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert silent == []


def packages_with_a_door() -> list[str]:
    """Every package, and the module, that says by `__all__` what it offers."""
    found = [edgefl.__name__]
    for info in pkgutil.walk_packages(edgefl.__path__, "edgefl."):
        path = ROOT / Path(*info.name.split("."))
        file = path / "__init__.py" if info.ispkg else path.with_suffix(".py")
        if "__all__" in file.read_text(encoding="utf-8"):
            found.append(info.name)
    return found


@pytest.mark.parametrize("name", packages_with_a_door())
def test_the_public_door_opens(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for each in module.__all__:
        assert getattr(module, each) is not None
    assert set(module.__all__) <= set(dir(module))


def test_a_door_that_is_not_there_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'edgefl' has no attribute 'magic'"):
        _ = edgefl.magic


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == edgefl.__version__ == version("edgefl-fleet")
    assert f"\n## {edgefl.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_command_of_the_project_can_be_loaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for reference in project["entry-points"]["edgefl.commands"].values():
        module, _, attribute = reference.partition(":")
        assert hasattr(importlib.import_module(module), attribute), reference


def test_ci_runs_what_everybody_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert commands == ["make check", "make test"]
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()}
    assert {"demo", "test", "check", "soak", "bench"} <= targets
