"""One version: of the package, of the installation, of the changelog."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import edgefl
from edgefl.process.version import __version__

ROOT = Path(__file__).parents[3]


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__ == edgefl.__version__ == version("edgefl-fleet")
    assert f"\n## {__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
