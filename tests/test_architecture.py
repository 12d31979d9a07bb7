"""The house keeps its shape: who imports whom, how light a door is, how long a file, and that each has its test."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import pkgutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import edgefl
from edgefl.app.cli import OWN
from edgefl.flower import run_flower_app

ROOT = Path(__file__).parents[1]
PACKAGES = ("edgefl", "cloud", "edge_agent")
MAX_LINES, MAX_FILES = 400, 14
HEAVY = {"torch", "flwr", "grpc", "onnx", "onnxruntime", "onnxscript", "fastapi", "sqlalchemy", "paho", "ray"}


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
        ("edgefl.exchange", set()),
        ("edgefl.rounds", set()),
        ("edgefl.aggregation.server_opt", set()),
        ("edgefl.protocols.manifest", set()),
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
    assert loaded_by(module) & HEAVY <= allowed


def loaded_by(module: str) -> set[str]:
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_public_door_loads_nothing_before_it_is_used() -> None:
    assert loaded_by("edgefl") & (HEAVY | {"numpy", "httpx", "click", "rich", "cryptography", "dacite"}) == set()


def test_a_pool_worker_loads_no_tool_of_a_command_or_the_network() -> None:
    """It is started by the dozen, to train: who reads its own peak memory needs no client of the cloud."""
    loaded = loaded_by("edgefl.simulation.engines.pool.worker")
    assert "numpy" in loaded
    assert loaded & (HEAVY | {"httpx", "click", "rich", "cryptography"}) == set()


def test_no_source_file_is_too_long() -> None:
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(*PACKAGES, "benchmarks", "examples", "tests")
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_each_class_has_a_distinct_name() -> None:
    """A search for a class name finds one class."""
    places: dict[str, list[str]] = {}
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(relative(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


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


def imports() -> dict[str, set[str]]:
    """Return whom each of our modules imports, anywhere in its file: in a function, or for types alone, too."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources(*PACKAGES)}
    paths = {name.removesuffix(".__init__"): path for name, path in names.items()}
    found: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports name the whole module"
                module = node.module or ""
                inside = {f"{module}.{one.name}" for one in node.names} & paths.keys()
                wanted = inside | ({module} if len(inside) < len(node.names) else set())
            else:
                continue
            found[name] |= wanted & paths.keys() - {name}
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Whoever has nobody left below is taken away, until none is: what stays is in a circle, or imports one."""
    left = imports()
    while free := {name for name, wanted in left.items() if not wanted & left.keys()}:
        left = {name: wanted for name, wanted in left.items() if name not in free}
    assert {name: sorted(wanted & left.keys()) for name, wanted in left.items()} == {}


def test_no_folder_holds_too_many_files() -> None:
    counts = Counter(relative(path.parent) for path in sources(*PACKAGES))
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES} == {}


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


def sections(config: type) -> Iterator[type]:
    """Yield a configuration and all that are inside it."""
    yield config
    for hint in get_type_hints(config).values():
        for one in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(one) and isinstance(one, type):
                yield from sections(one)


def test_every_configuration_and_result_can_be_imported_from_the_door() -> None:
    configs = {*sections(edgefl.JobConfig), *sections(edgefl.SimulationConfig)}
    results = {
        get_type_hints(function)["return"] for function in (edgefl.run, edgefl.simulate, edgefl.sweep, run_flower_app)
    }
    assert {kind.__name__ for kind in configs | results} <= set(edgefl.__all__)


def test_a_door_that_is_not_there_says_so() -> None:
    with pytest.raises(AttributeError, match="module 'edgefl' has no attribute 'magic'"):
        _ = edgefl.magic


def test_every_command_of_the_project_can_be_loaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for reference in (*project["entry-points"]["edgefl.commands"].values(), *OWN.values()):
        module, _, attribute = reference.partition(":")
        assert hasattr(importlib.import_module(module), attribute), reference


def test_ci_runs_what_everybody_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert commands == ["make check", "make test"]
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()}
    assert {"demo", "test", "check", "soak", "bench"} <= targets
