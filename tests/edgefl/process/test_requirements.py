"""The dependencies of a task: read as pip reads them, and compared with packages that are really on sys.path."""

import importlib.metadata

import pytest

from edgefl.errors import ConfigError
from edgefl.process.requirements import (
    needs,
    own_closure,
    refuse_unmet,
    requirement_in,
    requirements_in,
    requirements_of,
    unmet,
)  # fmt: skip
from edgefl.task import load_task


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Install packages that are nothing but metadata: `packages("name", "1.0", "requirement", ...)`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(name, version, *requires):
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, "", ""]))
        importlib.invalidate_caches()

    return install


def pyproject(dependencies):
    return f"[project]\nname = 'x'\ndependencies = {dependencies}\n"


@pytest.mark.parametrize(
    ("requirement", "missing"),
    [
        ("ours-a", []),
        ("Ours_A>=1.4,<2", []),
        ("ours-a>=1.5", ["ours-a>=1.5, has 1.4.2"]),
        ("ours-a==1.4.2", []),
        ("ours-a<1", ["ours-a<1, has 1.4.2"]),
        ("nosuch-package", ["nosuch-package, has none"]),
        ("nosuch-package>=1; sys_platform == 'commodore64'", []),
        ("nosuch-package>=1; python_version >= '3'", ["nosuch-package>=1, has none"]),
        ("nosuch-package; extra == 'gpu'", []),
        ("ours-pre>=1", []),
        ("ours-local>=2.13", []),
        ("nosuch-package @ https://example.org/x.whl", ["nosuch-package, has none"]),
    ],
)
def test_one_requirement(packages, requirement, missing):
    packages("ours-a", "1.4.2")
    packages("ours-pre", "2.0rc1")
    packages("ours-local", "2.13.0+cpu")
    assert unmet([requirement]) == missing


def test_an_extra_stands_for_what_it_brings(packages):
    packages("ours-a", "1.0", "always-there", "ours-b>=2; extra == 'fast'", "ours-a[fast]; extra == 'all'",
             "nosuch-c; extra == 'all'", "nosuch-d; extra == 'other'")  # fmt: skip
    packages("ours-b", "1.5")
    assert unmet(["ours-a"]) == []
    assert unmet(["ours-a[fast]"]) == ["ours-b>=2, has 1.5"]
    assert unmet(["ours-a[all]"]) == ["ours-b>=2, has 1.5", "nosuch-c, has none"]
    assert unmet(["ours-a[all,fast]", "ours-a[fast]"]) == ["ours-b>=2, has 1.5", "nosuch-c, has none"]


def test_extras_that_name_each_other_end(packages):
    packages("ours-a", "1.0", "ours-a[y]; extra == 'x'", "ours-a[x]; extra == 'y'")
    assert unmet(["ours-a[x]"]) == []


def test_edgefl_itself_by_both_names():
    assert unmet(["edgefl", "edgefl-fleet>=0.1", "edgefl[train]"]) == []
    assert unmet(["edgefl-fleet>=99"])[0].startswith("edgefl-fleet>=99, has 0.")


def test_what_is_told():
    missing = ["a>=1, has none", "b<3, has 3.2"]
    assert needs(missing) == "needs a>=1, has none; needs b<3, has 3.2"
    assert [requirement_in(one) for one in missing] == ["a>=1", "b<3"]


def test_where_they_are_read(tmp_path):
    assert requirements_in(tmp_path) == ()
    (tmp_path / "pyproject.toml").write_text("[tool.edgefl]\ntask = 'x:task'\n")
    assert requirements_in(tmp_path) == ()
    (tmp_path / "pyproject.toml").write_text(pyproject(["a>=1", "b"]))
    assert requirements_in(tmp_path) == ("a>=1", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (pyproject("'numpy'"), "dependencies is 'numpy'; expected a list"),
        (pyproject([1]), r"dependencies is \[1\]; expected a list"),
        (pyproject(["numpy>>1"]), r"'numpy>>1' is not a requirement: "),
        (pyproject(["-r other.txt"]), "'-r other.txt' is not a requirement"),
        (pyproject([f"p{n}" for n in range(201)]), "expected a list"),
        ("[project", "is not a valid pyproject.toml"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(ConfigError, match=rf"^here.*{message}"):
        requirements_of(text, "here")


def test_a_task_is_refused_before_its_module_is_imported(tmp_path):
    (tmp_path / "broken_task.py").write_text("raise RuntimeError('it was imported')")
    (tmp_path / "pyproject.toml").write_text(
        pyproject(["nosuch-package>=1", "numpy<1"]) + "[tool.edgefl]\ntask = 'broken_task:task'\n"
    )
    with pytest.raises(ConfigError, match=r"needs nosuch-package>=1, has none; needs numpy<1, has \d.*"
                       r"-m pip install 'nosuch-package>=1' 'numpy<1'$"):  # fmt: skip
        load_task(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^task 'mine' needs"):
        refuse_unmet("mine", tmp_path)


def test_what_the_trainer_uses_of_edgefl():
    found = own_closure(["agent", "train"])
    assert {"edgefl-fleet", "numpy", "torch", "onnxruntime", "grpcio", "protobuf"} <= found.keys()
    assert found["numpy"] == importlib.metadata.version("numpy")
    assert "flwr" not in found
    assert "pytest" not in found
