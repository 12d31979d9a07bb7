"""Tasks are found by reference, and their faults are told with the user's file and line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgefl.errors import ConfigError, TaskError
from edgefl.task import Task, import_task, load_task, locate_task

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
TASK = """
from edgefl import Task
from helper import NAME
task = Task(name=NAME, initial=lambda: {}, fit=lambda *_: None)
"""


def make_folder(folder: Path, name: str = "digits", code: str = TASK, key: str = 'task = "task:task"') -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(f"[tool.edgefl]\n{key}\n")
    (folder / "task.py").write_text(code)
    (folder / "helper.py").write_text(f"NAME = {name!r}\n")
    return folder


@pytest.fixture(autouse=True)
def _imports_restored(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"task", "helper", "outside", "outsider"}:
            del sys.modules[name]


def test_a_flower_apps_folder_is_no_task_and_says_how_its_model_is_published():
    with pytest.raises(ConfigError, match=r"flower-app is a Flower app and no task.*models publish NAME --onnx FILE"):
        load_task(str(DIGITS.with_name("flower-app")))


def test_a_folder_is_loaded(tmp_path):
    assert load_task(str(make_folder(tmp_path / "a"))).name == "digits"


def test_two_folders_with_modules_of_the_same_names_stay_apart(tmp_path):
    a, b = make_folder(tmp_path / "a", "first"), make_folder(tmp_path / "b", "second")
    assert [load_task(str(folder)).name for folder in (a, b, a)] == ["first", "second", "first"]


def test_a_folder_loaded_twice_in_a_row_gives_the_same_task(tmp_path):
    folder = make_folder(tmp_path / "a")
    assert load_task(str(folder)) is load_task(str(folder))


def test_a_late_import_finds_the_files_of_the_current_folder(tmp_path):
    late = "\ndef late():\n    import late_helper\n    return late_helper.NAME\n"
    for name in ("a", "b"):
        (make_folder(tmp_path / name, code=TASK + late) / "late_helper.py").write_text(f"NAME = {name!r}")
    for name in ("a", "b", "a"):
        load_task(str(tmp_path / name))
        assert sys.modules["task"].late() == name
    del sys.modules["late_helper"]


def test_modules_of_a_folder_that_was_left_are_not_found(tmp_path):
    load_task(str(make_folder(tmp_path / "a")))
    (make_folder(tmp_path / "b") / "helper.py").unlink()
    with pytest.raises(TaskError, match="No module named 'helper'"):
        load_task(str(tmp_path / "b"))


def test_a_folder_cannot_replace_edgefl_or_the_standard_library(tmp_path):
    folder = make_folder(tmp_path / "a")
    (folder / "edgefl").mkdir()
    (folder / "edgefl" / "__init__.py").write_text("Task = None")
    (folder / "json.py").write_text("raise SystemExit")
    import edgefl

    load_task(str(folder))
    assert sys.modules["edgefl"] is edgefl
    assert hasattr(sys.modules["json"], "loads")


def test_a_module_reference_is_loaded_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine.py").write_text(
        "from edgefl import Task\nthe_task = Task(name='m', initial=dict, fit=print)"
    )
    monkeypatch.chdir(tmp_path)
    assert load_task("outside.mine:the_task").name == "m"


def test_locating_imports_nothing(tmp_path):
    folder = make_folder(tmp_path / "a", code="raise SystemExit")
    located = locate_task(str(folder))
    assert (located.task, located.folder, located.top_module) == ("task:task", folder, "task")


def test_references_that_lead_nowhere(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        load_task(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="no module 'outsider'"):
        load_task("outsider.task:task")
    with pytest.raises(ConfigError, match=r"no module 'edgefl\.nothing'"):
        load_task("edgefl.nothing:task")
    with pytest.raises(ConfigError, match="not of the form module:attribute"):
        import_task("task")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", r"\[tool.edgefl\] task is missing"),
        ("task = 3", r"\[tool.edgefl\] task is 3"),
        ('task = "task"', r"task is 'task'; expected task = \"module:attribute\""),
        ("task =", "is not a valid pyproject.toml"),
        ('task = "other:task"', "has no module 'other'"),
        ('task = "task:taks"', "has no attribute 'taks'; tasks in it: task"),
        ('task = "task:NAME"', "of type str, not an edgefl.Task"),
    ],
)
def test_faults_of_a_folder(tmp_path, key, message):
    with pytest.raises(ConfigError, match=message):
        load_task(str(make_folder(tmp_path / "a", key=key)))


def test_a_folder_without_pyproject(tmp_path):
    with pytest.raises(ConfigError, match=r"no pyproject\.toml"):
        load_task(str(tmp_path))


def test_a_broken_section_in_pyproject(tmp_path):
    (tmp_path / "pyproject.toml").write_text("tool = 3")
    with pytest.raises(ConfigError, match=r"is not a valid pyproject\.toml"):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("\n\n1 / 0", r"ZeroDivisionError: division by zero \(.*task.py:3\)"),
        ("import nowhere_at_all", r"ModuleNotFoundError: No module named 'nowhere_at_all' \(.*task.py:1\)"),
        ("def f(:\n", r"SyntaxError: .*task.py:1\)"),
        ("import sys\nsys.exit(3)", r"SystemExit: 3 \(.*task.py:2\)"),
        ("from edgefl import Task\ntask = Task(name='half')", r"must have either model, loss.*task.py:2\)"),
    ],
)
def test_what_the_users_module_raises_is_told_with_its_line(tmp_path, code, message):
    with pytest.raises(TaskError, match=message):
        load_task(str(make_folder(tmp_path / "a", code=code)))


def test_a_task_is_either_of_torch_or_of_its_own():
    with pytest.raises(ConfigError, match="either model, loss and train_data, or initial and fit"):
        Task(name="neither")
    with pytest.raises(ConfigError, match="either"):
        Task(name="both", model=print, loss=print, train_data=print, initial=dict, fit=print)  # type: ignore[arg-type]


FLOWER = """
import json
import sys
from pathlib import Path

from edgefl.config import load_config, JobConfig
from edgefl.task import load_task

task = load_task(sys.argv[1])
assert "flwr" not in sys.modules
from edgefl.flower import make_apps

config = load_config(JobConfig, Path(sys.argv[1]) / "config.toml", ["rounds.count=2"])
server_app, client_app = make_apps(task, config)

from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

ending = ServerApp()

@ending.main()
def main(grid, context):
    server_app(grid, context)
    Path(sys.argv[2]).write_text(json.dumps([dict(context.state[f"round-{number}"]) for number in (1, 2)]))

resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
run_simulation(ending, client_app, num_supernodes=2, backend_config=resources)
"""


@pytest.mark.soak
def test_a_task_runs_in_flowers_own_engine_and_gives_what_ours_gives(tmp_path):
    """In a process of its own, as who uses it would: Flower's engine is Ray."""
    import edgefl
    from edgefl.config import load_config
    from edgefl.local_fleet import QUIET
    from edgefl.simulation.world.settings import SimulationConfig

    (tmp_path / "app.py").write_text(FLOWER)
    command = [sys.executable, tmp_path / "app.py", DIGITS, tmp_path / "rounds.json"]
    done = subprocess.run(
        command, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / "rounds.json").read_text())
    config = load_config(SimulationConfig, DIGITS / "config.toml")
    ours = edgefl.simulate(DIGITS, clients=2, rounds=2, engine="loop", config=config)
    for one, other in zip(theirs, ours.rounds, strict=True):
        assert one["train_loss"] == pytest.approx(other.metrics["train_loss"], rel=0.01)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [("module_of_nobody", "and its package's name"), ("torch.no_such_part", r"pip install .*\[train\]'")],
)
def test_what_a_task_imports_and_this_machine_lacks_is_named_with_its_remedy(
    tmp_path: Path, module: str, wanted: str
) -> None:
    (tmp_path / "lacking_task.py").write_text(f"import {module}\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('[tool.edgefl]\ntask = "lacking_task:task"\n', encoding="utf-8")
    with pytest.raises(TaskError, match=rf"No module named '{module}'.*not installed for .*{wanted}"):
        load_task(str(tmp_path))
