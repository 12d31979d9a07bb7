"""`edgefl new`: each kind's folder runs, learns and passes its own tests; what cannot be a name is said in words."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgefl.app.commands import new as module
from edgefl.app.commands.new import KINDS, MAX_NAME_CHARS, new, refuse_name, rendered
from edgefl.errors import ConfigError

ROOT = Path(__file__).parents[4]
SOAK = {"flower", "image"}  # those that take longest


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))


def invoke(*arguments):
    return CliRunner().invoke(new, [str(one) for one in arguments], catch_exceptions=False)


def run(*command, cwd=None):
    command = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kinds():
    return [pytest.param(kind, marks=[pytest.mark.soak] if kind in SOAK else []) for kind in KINDS]


@pytest.mark.parametrize("kind", kinds())
def test_a_new_folder_is_simulated_and_learns(kind):
    run("edgefl", "new", "first-try", "--kind", kind)
    run("edgefl", "simulate", "first-try", "--clients", 10, "--rounds", 5, "--json", "a.json")
    rounds = json.loads(Path("a.json").read_text())["rounds"]
    assert [one["admitted"] for one in rounds] == [10] * 5
    first, *_, last = (one["metrics"][KINDS[kind].metric] for one in rounds)
    assert last > max(first, 0.8), rounds


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_tests_pass(kind):
    invoke("first-try", "--kind", kind)
    assert re.search(r"[12] passed", run("pytest", "first-try"))


@pytest.mark.soak
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "flower"])
def test_its_model_can_be_published(kind, tmp_path):
    import edgefl
    from edgefl.operator.publish import export
    from edgefl.task import load_task

    invoke(f"try-{kind}", "--kind", kind)  # a name per kind: the folder stays importable in this process
    task = load_task(f"try-{kind}")
    edgefl.simulate(task, clients=10, rounds=5, engine="loop", out=tmp_path / "out")
    compression = "none" if kind == "sklearn" else "int8"
    exported = export(task, tmp_path / "out", tmp_path, compression=compression, max_drop=0.02)
    assert exported.metrics[KINDS[kind].metric] > 0.8


@pytest.mark.soak
def test_the_flower_app_is_one_to_flower():
    invoke("first-try", "--kind", "flower")
    flwr = Path(sys.executable).with_name("flwr")
    done = subprocess.run([flwr, "build"], capture_output=True, text=True, timeout=60, check=False, cwd="first-try")
    assert len(list(Path("first-try").glob("*.fab"))) == 1, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_its_files_are_in_good_order(kind):
    """As a linter sees them in a user's project, where edgefl is an installed package."""
    invoke("first-try", "--kind", kind)
    config = ROOT / "pyproject.toml"
    run("ruff", "check", "--no-cache", "--config", config, "--ignore", "INP001,PLR2004,S101,D", cwd="first-try")
    run("ruff", "format", "--no-cache", "--config", config, "--check", cwd="first-try")


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_needs_and_what_comes_next(kind):
    invoke("first-try", "--kind", kind)
    project = tomllib.loads(Path("first-try", "pyproject.toml").read_text())
    assert (project["project"]["name"], project["project"]["version"]) == ("first-try", "0.1.0")
    assert project["project"]["dependencies"] == list(KINDS[kind].dependencies)
    readme = Path("first-try", "README.md").read_text()
    assert len(readme.splitlines()) <= 10
    for command in ("simulate first-try", "run first-try", "models publish first-try", "rollout start first-try"):
        assert f"edgefl {command}" in readme
    assert "{{" not in "".join(path.read_text() for path in Path("first-try").iterdir())


def test_the_config_is_valid():
    from edgefl.config import JobConfig, load_config

    invoke("first-try")
    assert load_config(JobConfig, Path("first-try", "config.toml")).rounds.quorum == 2


def test_what_is_printed():
    done = invoke("in/wine")
    assert done.output.splitlines() == [
        "in/wine/",
        "  wine.py         what is trained: start here",
        "  test_wine.py    its tests",
        "  config.toml     settings of rounds and training",
        "  pyproject.toml  where the task is, and what it needs",
        "  README.md       the commands that come next",
        "next:",
        "  edgefl simulate in/wine --clients 10 --rounds 5",
        "  python -m pytest in/wine",
    ]


def test_what_is_not_installed_comes_first(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    _, _, commands = invoke("camera", "--kind", "image").output.partition("next:\n")
    installed = [line.partition("pip install ")[2] for line in commands.splitlines()]
    assert re.search(r"\[train,examples\]", installed[0])
    assert installed[1:] == ["pytest", "", ""]


def test_the_json():
    invoke("wine", "--kind", "sklearn", "--json", "a.json")
    assert json.loads(Path("a.json").read_text()) == {
        "name": "wine",
        "kind": "sklearn",
        "files": ["wine.py", "test_wine.py", "pyproject.toml", "README.md"],
    }
    assert sorted(path.name for path in Path("wine").iterdir()) == sorted(rendered(KINDS["sklearn"], "wine"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Wine List", "expected 1 to 32 of a-z .*, such as wine-list"),
        ("2x", r"'2x' cannot be a name: .* the last a letter or digit$"),
        ("", "expected 1 to 32"),
        ("wine_", "such as wine"),
        ("w" * (MAX_NAME_CHARS + 1), f"such as {'w' * MAX_NAME_CHARS}"),
        ("class", "is a word of the Python language; choose another, such as my-class"),
        ("test-wine", "is the name of a file of tests; choose another, such as my-test-wine"),
        ("random", r"already a Python module 'random' \(of Python itself\), .* such as my-random"),
        ("numpy", r"already a Python module 'numpy' \(/.*__init__\.py\)"),
    ],
)
def test_what_cannot_be_a_name(name, why):
    with pytest.raises(ConfigError, match=why):
        refuse_name(name)


def test_flower_allows_fewer_names():
    refuse_name("first_try")
    with pytest.raises(ConfigError, match="Flower allows no _ in an app's name: choose another, such as first-try"):
        refuse_name("first_try", "flower")


def test_nothing_that_is_there_is_changed():
    Path("empty").mkdir()
    assert invoke("empty").exit_code == 0
    before = {path: path.read_bytes() for path in Path("empty").iterdir()}
    with pytest.raises(ConfigError, match="empty is a folder that is not empty, and nothing in it is changed"):
        invoke("empty", "--kind", "text")
    assert {path: path.read_bytes() for path in Path("empty").iterdir()} == before
    Path("file").touch()
    with pytest.raises(ConfigError, match="file is there already and is no folder"):
        invoke("file")
    with pytest.raises(ConfigError, match="cannot write file/wine: Not a directory"):
        invoke("file/wine")


def test_an_unknown_kind_is_answered_by_the_known_ones():
    done = invoke("wine", "--kind", "audio")
    assert done.exit_code == 2
    assert "'audio' is not one of 'image', 'tabular', 'text', 'sensor', 'sklearn', 'flower'" in done.output
    assert not Path("wine").exists()


def test_the_help_describes_each_kind():
    said = invoke("--help").output
    assert all(f"{kind:8} {one.summary}" in said for kind, one in KINDS.items())
