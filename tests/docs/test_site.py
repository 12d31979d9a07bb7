"""The site as `make docs` builds it: warnings are errors, and nothing in it is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, generated, written

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="pip install '.[docs]'"),
]

REMOTE = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc="?https?:|<link[^>]*rel="?(?:stylesheet|preconnect|icon)"""
                    r"""[^>]*href="?https?:|url\(["']?https?:|@import\s+["']?https?:""")  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    recipe = (ROOT / "Makefile").read_text("utf-8").partition("\ndocs:")[2].splitlines()[1]
    assert recipe == "\t$(BIN)/python -m mkdocs build --strict"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_each_page_is_there(site: Path) -> None:
    pages = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")} - {"404.md"}
    assert pages == {*written(), *generated()}
    assert list(site.rglob("*.py")) == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert {str(file): found[0] for file in files if (found := REMOTE.search(file.read_text("utf-8")))} == {}


def test_the_python_api_has_signatures_and_tables_of_fields(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text("utf-8")
    assert 'id="edgefl.simulate"' in page
    assert "Held-out data, evaluated on the operator" in page or "held-out data, evaluated on the operator" in page
