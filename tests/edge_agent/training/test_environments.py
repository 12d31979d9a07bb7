"""The packages that a task needs: refused with the reason, or installed from a local index into an environment."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from edge_agent.training import environments
from edge_agent.training.environments import DONE, MAX_KEPT, Environments, reason_in
from edgefl.errors import ConfigError, DiskFull, TaskError

NUMPY = importlib.metadata.version("numpy")
TASK = """
    import sys
    import numpy as np
    from edgefl import FitResult, Task

    def fit(parameters, config, options):
        import ours_words
        with open(options["log"], "a") as log:
            log.write(f"{ours_words.VERSION} {np.__file__.startswith(sys.prefix)} ")
        return FitResult(tree={name: np.ones_like(value) for name, value in parameters.items()}, weight=1.0)

    task = Task(name="t", initial=dict, fit=fit)
"""

CONFLICT = """Collecting x
ERROR: Cannot install x and y.

The conflict is caused by:
    x 1 depends on numpy<1
    The user requested (constraint) numpy==2.4

To fix this you could try to:
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip uses as its only index; `index(name, version, *requires)` adds one."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def add(name: str, version: str, *requires: str) -> None:
        info, needed = f"{name}-{version}.dist-info", "".join(f"Requires-Dist: {one}\n" for one in requires)
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")

    return add


def archive(folder: Path, *dependencies: str, text: str | None = None) -> Path:
    path = folder / f"{abs(hash((dependencies, text))):x}.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("pyproject.toml", text or f"[project]\ndependencies = {list(dependencies)}\n")
    return path


def get(home: Path, *archives: Path, may_install: bool = True, **options) -> list[str]:
    async def inside() -> list[str]:
        found = Environments(home, may_install=may_install, **options)
        running = asyncio.create_task(found.run())
        try:
            return [await found.get(one) for one in archives]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return asyncio.run(inside())


def names(environment: str) -> list[str]:
    return sorted(path.name for path in Path(environment).iterdir() if not path.name.startswith("_"))


def test_what_is_there_needs_no_environment(tmp_path):
    there = archive(tmp_path, "numpy>=1", "edgefl-fleet[train]", "nosuch; sys_platform == 'commodore64'")
    assert get(tmp_path, there, may_install=False) == [""]
    no_folder = tmp_path / "module.zip"
    with zipfile.ZipFile(no_folder, "w") as file:
        file.writestr("user_task.py", "")
    assert get(tmp_path, no_folder) == [""]
    assert not (tmp_path / "environments").exists()


def test_without_permission_nothing_is_installed_and_the_reason_is_told(tmp_path, index):
    index("ours_words", "1.2")
    with pytest.raises(
        TaskError, match=rf"^needs ours-words>=1, has none; needs numpy<1, has {NUMPY}\. .*--install-dependencies$"
    ):
        get(tmp_path, archive(tmp_path, "ours-words>=1", "numpy<1"), may_install=False)
    assert not (tmp_path / "environments").exists()


def test_only_what_is_missing_is_installed_and_it_is_kept(tmp_path, index):
    index("ours_words", "1.2", "ours-deep>=2", "numpy>=1")
    index("ours_deep", "2.1")
    index("ours_deep", "1.9")
    (first,) = get(tmp_path, archive(tmp_path, "ours-words>=1", "numpy"))
    assert names(first) == ["ours_deep-2.1.dist-info", "ours_deep.py", "ours_words-1.2.dist-info", "ours_words.py"]
    shutil.rmtree(tmp_path / "wheels")  # not needed again
    assert get(tmp_path, archive(tmp_path, "numpy", "ours-words>=1")) == [first]


def test_an_installed_package_that_is_too_old_is_replaced_for_the_task_alone(tmp_path, index, monkeypatch):
    site = tmp_path / "own" / "site-packages"
    index("ours_words", "1.0")
    with zipfile.ZipFile(tmp_path / "wheels" / "ours_words-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    index("ours_words", "1.2")
    monkeypatch.syspath_prepend(str(site))
    (found,) = get(tmp_path, archive(tmp_path, "ours-words>=1.1"))
    assert (Path(found) / "ours_words-1.2.dist-info").exists()
    assert (site / "ours_words-1.0.dist-info").exists()


def test_numpy_is_never_replaced_and_the_conflict_is_told_in_one_line(tmp_path, index):
    index("ours_words", "1.2", "numpy<1")
    index("numpy", "0.9")
    with pytest.raises(TaskError, match=rf"^installing ours-words>=1 .*failed: .*numpy<1.*numpy=={NUMPY}") as refusal:
        get(tmp_path, archive(tmp_path, "ours-words>=1"))
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "environments").iterdir()) == []


@pytest.mark.soak
def test_distutils_stays_in_the_process_if_setuptools_has_its_hook(tmp_path, index, monkeypatch):
    index("ours_words", "1.2")
    distutils = ModuleType("distutils")
    monkeypatch.setitem(sys.modules, "distutils", distutils)
    get(tmp_path, archive(tmp_path, "ours-words"))
    assert sys.modules["distutils"] is distutils


def test_what_the_index_has_not(tmp_path, index):
    with pytest.raises(TaskError, match=r"failed: .*No matching distribution found for ours-words>=1"):
        get(tmp_path, archive(tmp_path, "ours-words>=1"))


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TaskError, match="failed: no network: the package index cannot be reached"):
        get(tmp_path, archive(tmp_path, "ours-words>=1"))


def test_a_failure_is_repeated_without_another_try(tmp_path, index):
    async def twice() -> None:
        found = Environments(tmp_path, may_install=True)
        running = asyncio.create_task(found.run())
        for _ in range(2):
            with pytest.raises(TaskError, match="No matching distribution"):
                await found.get(archive(tmp_path, "ours-words>=1"))
            index("ours_words", "1.0")  # too late for the second
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(twice())


def test_a_round_that_ends_does_not_stop_the_install(tmp_path, index):
    index("ours_words", "1.2")
    wanted = archive(tmp_path, "ours-words")

    async def inside() -> None:
        found = Environments(tmp_path, may_install=True)
        running = asyncio.create_task(found.run())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await found.get(wanted)
        assert names(await found.get(wanted)) == ["ours_words-1.2.dist-info", "ours_words.py"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(inside())


def test_an_install_has_a_deadline(tmp_path, index):
    index("ours_words", "1.2")
    with pytest.raises(TaskError, match=r"installing ours-words .*took longer than 0\.05 s"):
        get(tmp_path, archive(tmp_path, "ours-words"), install_s=0.05)
    assert list((tmp_path / "environments").iterdir()) == []


def test_nobody_waits_for_an_install_that_a_bug_has_ended(tmp_path, index, monkeypatch):
    index("ours_words", "1.2")
    monkeypatch.setattr(environments, "own_closure", lambda _extras: {}["a bug"])
    with pytest.raises(TaskError, match=r"the install was cut short: KeyError\('a bug'\)"):
        get(tmp_path, archive(tmp_path, "ours-words"))


def test_a_full_disk_is_told_before_anything_is_installed(tmp_path, index, monkeypatch):
    monkeypatch.setattr(environments, "SPACE_BYTES", 1 << 60)
    with pytest.raises((DiskFull, TaskError), match=r"an environment with ours-words.* of disk space"):
        get(tmp_path, archive(tmp_path, "ours-words"))


def test_the_oldest_environments_are_removed_and_halves_at_the_start(tmp_path, index):
    index("ours_words", "1.2")
    made = tmp_path / "environments"
    for n in range(MAX_KEPT + 2):
        (made / f"{n}").mkdir(parents=True)
        (made / f"{n}" / DONE).touch()
        os.utime(made / f"{n}", (n, n))
    (made / ".half").mkdir()
    (found,) = get(tmp_path, archive(tmp_path, "ours-words"))
    kept = {path.name for path in made.iterdir()}
    assert kept == {"3", "4", "5", Path(found).parents[2].name}
    assert len(kept) == MAX_KEPT


def test_without_pip_the_device_says_how_to_get_it(tmp_path, index, monkeypatch):
    monkeypatch.setattr(environments, "PathFinder", SimpleNamespace(find_spec=lambda _name: None))
    with pytest.raises(TaskError, match=rf"{sys.executable} has neither pip nor ensurepip.*install ours-words"):
        get(tmp_path, archive(tmp_path, "ours-words"))


def test_a_flower_app_may_name_what_only_its_simulation_needs(tmp_path):
    text = "[project]\ndependencies = ['nosuch-simulator']\n[tool.flwr.app]\npublisher = 'x'\n"
    assert get(tmp_path, archive(tmp_path, text=text), may_install=False) == [""]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "[project]\ndependencies = ['a>>1']\n",
            ConfigError,
            "the task's pyproject.toml: .*'a>>1' is not a requirement",
        ),
        ("[project", ConfigError, "is not a valid pyproject.toml"),
    ],
)
def test_what_cannot_be_read(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        get(tmp_path, archive(tmp_path, text=text))


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (CONFLICT, "Cannot install x and y.; x 1 depends on numpy<1, The user requested (constraint) numpy==2.4"),
        ("ERROR: one\nERROR: two\nERROR: one\n", "one; two"),
        ("WARNING: Retrying ... NewConnectionError('...')\nERROR: No matching distribution found for x",
         "no network: the package index cannot be reached"),
        ("Segmentation fault", "Segmentation fault"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_reason_in_what_pip_prints(output, reason):
    assert reason_in(output) == reason


def test_a_task_trains_with_what_was_installed_and_another_task_with_another_version(fleet, on_device, index):
    index("ours_words", "1.0")
    index("ours_words", "2.0")

    async def run(device):
        for number, wanted in ((1, "ours-words<2"), (2, "ours-words>=2"), (3, "ours-words<2")):
            bundle = fleet.bundle(TASK, [wanted])
            device.participant.handle(fleet.plan(number, bundle=bundle))
            await device.until(lambda number=number: ("j1", number) in fleet.updates or fleet.failures)
        assert fleet.failures == {}
        assert device.fits() == "1.0 True 2.0 True 1.0 True"

    on_device(run, may_install=True)


def test_a_device_that_lacks_something_says_so_at_once_and_downloads_no_model(fleet, on_device):
    async def run(device):
        device.participant.handle(fleet.plan(1, bundle=fleet.bundle(TASK, ["ours-words>=1"])))
        await device.until(lambda: fleet.failures)
        assert fleet.failures["j1", 1].startswith("needs ours-words>=1, has none. Install it there, or start the agent")
        assert len([call for call in fleet.calls if call.startswith("download")]) == 1  # the bundle

    on_device(run)
