"""Home folders: one process, one kind, one format; every refusal says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgefl.errors import HomeError
from edgefl.process.home import FORMAT, check_home, create_home, home_in_use, lock_home, replace_file


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "home"
    create_home(folder, "agent")
    return folder


def mark(folder: Path, content: str) -> None:
    (folder / "home.json").write_text(content)


def test_a_home_is_private_and_says_what_it_is(home: Path) -> None:
    assert home.stat().st_mode & 0o777 == 0o700
    assert json.loads((home / "home.json").read_text())["kind"] == "agent"
    check_home(home, "agent")


def test_making_a_home_twice_changes_nothing(home: Path) -> None:
    before = (home / "home.json").read_bytes()
    create_home(home, "agent")
    assert (home / "home.json").read_bytes() == before


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(HomeError, match="is not empty and not an edgefl home"):
        create_home(tmp_path, "agent")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_cannot_be_a_home(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for home in (file, file / "home", file / "deep" / "home"):
        with pytest.raises(HomeError) as refused:
            create_home(home, "agent")
        assert f"cannot use {home} as a home: {file} is a file" in str(refused.value)
        assert "run this as" not in str(refused.value)
    with pytest.raises(HomeError, match="file is a file, not the home of an edgefl agent; name its folder"):
        check_home(file, "agent")


@pytest.mark.parametrize(("kind", "command"), [("agent", "edgefl agent enroll"), ("cloud", "edgefl cloud start")])
def test_a_missing_home_says_which_command_makes_one(tmp_path: Path, kind: str, command: str) -> None:
    with pytest.raises(HomeError, match=command):
        check_home(tmp_path / "gone", kind)


def test_the_home_of_another_kind_is_refused(home: Path) -> None:
    for use in (check_home, create_home):
        with pytest.raises(HomeError, match="is the home of an edgefl agent, not of an edgefl cloud"):
            use(home, "cloud")


def test_a_newer_home_is_refused_and_left_as_it_is(home: Path) -> None:
    mark(home, json.dumps({"kind": "agent", "format": FORMAT + 1, "made_by": "9.9"}))
    before = (home / "home.json").read_bytes()
    for use in (check_home, create_home):
        with pytest.raises(HomeError, match=f"format {FORMAT + 1}, made by edgefl 9.9"):
            use(home, "agent")
    assert (home / "home.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"kind": "agent"}', '{"kind": "agent", "format": "new"}'])
def test_a_damaged_home_is_named(home: Path, content: str) -> None:
    mark(home, content)
    with pytest.raises(HomeError, match=r"home\.json is damaged"):
        check_home(home, "agent")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_anothers_home_says_so(home: Path) -> None:
    os.seteuid(65534)  # nobody
    try:
        with pytest.raises(HomeError, match="belongs to another user; run this as that user or as root"):
            check_home(home, "agent")
        with pytest.raises(HomeError, match=r"cannot use .* as a home: Permission denied"):
            create_home(home, "agent")
    finally:
        os.seteuid(0)


def test_one_process_holds_a_home(home: Path) -> None:
    with lock_home(home), pytest.raises(HomeError, match=f"is in use by process {os.getpid()}"):
        lock_home(home)
    lock_home(home).close()


def test_who_asks_whether_a_home_is_in_use_does_not_hold_it(home: Path) -> None:
    assert not home_in_use(home)
    with lock_home(home):
        assert home_in_use(home)
    assert not home_in_use(home)
    lock_home(home).close()


def test_a_killed_process_lets_go(home: Path) -> None:
    script = "import sys, pathlib, edgefl.process.home; f = edgefl.process.home.lock_home(pathlib.Path(sys.argv[1]))"
    script += "; print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, home], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HomeError, match=f"is in use by process {holder.pid}"):
            lock_home(home)
        holder.kill()
        holder.wait(10)
        lock_home(home).close()


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    replace_file(file, b"old")
    replace_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
