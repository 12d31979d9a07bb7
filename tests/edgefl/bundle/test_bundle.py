"""Bundles: the same files give the same bytes, and nothing hostile comes out of one."""

import io
import os
import stat
import sys
import zipfile

import pytest

from edgefl import bundle
from edgefl.bundle import load_bundle, pack_bundle, unpack_bundle
from edgefl.errors import ConfigError, ProtocolError

CODE = "from edgefl import Task\nfrom own_part.names import NAME\ntask = Task(name=NAME, initial=dict, fit=print)\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "project"
    (folder / "own_part").mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "own_task:task"\n')
    (folder / "own_task.py").write_text(CODE)
    (folder / "own_part" / "names.py").write_text("NAME = 'packed'")
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in {"own_task", "own_part"}]:
        del sys.modules[name]


def names_in(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.namelist()


def zip_of(path, *entries):
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    return path


def test_packed_unpacked_and_loaded(folder, tmp_path):
    packed = pack_bundle(str(folder))
    file = tmp_path / "bundle.zip"
    file.write_bytes(packed.data)
    unpack_bundle(file, tmp_path / "there")
    assert load_bundle(tmp_path / "there", packed.task).name == "packed"
    assert (tmp_path / "there" / "own_task.py").read_text() == CODE


def test_the_bytes_depend_on_the_files_alone(folder):
    first = pack_bundle(str(folder)).data
    for path in folder.rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o755)
    assert pack_bundle(str(folder)).data == first
    (folder / "own_task.py").write_text(CODE + "\n")
    assert pack_bundle(str(folder)).data != first


def test_caches_hidden_files_and_environments_stay_behind(folder):
    for name in (
        "__pycache__/x.pyc",
        ".git/config",
        ".venv/a.py",
        "env/pyvenv.cfg",
        "env/a.py",
        "x.egg-info/PKG",
        ".env",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert names_in(pack_bundle(str(folder)).data) == ["own_part/names.py", "own_task.py", "pyproject.toml"]


def test_a_module_reference_packs_its_top_package_or_single_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names_in(pack_bundle("own_part.names:task").data) == ["own_part/names.py"]
    packed = pack_bundle("own_task:task")
    assert (names_in(packed.data), packed.task) == (["own_task.py"], "own_task:task")


@pytest.mark.parametrize("reference", ["nowhere_at_all:task", "sys:task", "__main__:task"])
def test_what_cannot_be_packed(reference):
    with pytest.raises(ConfigError, match=reference.partition(":")[0]):
        pack_bundle(reference)


def test_a_task_whose_module_is_not_in_the_folder(folder):
    (folder / "own_task.py").unlink()
    with pytest.raises(ConfigError, match="no module 'own_task'"):
        pack_bundle(str(folder))


def test_a_linked_folder_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="link to a folder"):
        pack_bundle(str(folder))


def test_a_folder_above_the_cap_names_its_largest_file(folder, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_BUNDLE_BYTES", 1 << 20)
    (folder / "huge.py").write_bytes(bytes(2 << 20))
    with pytest.raises(ConfigError, match=r"2\.0 MiB in 4 files.*largest: huge\.py \(2\.1 MB\), "):
        pack_bundle(str(folder))


def link_entry():
    entry = zipfile.ZipInfo("link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    "entries",
    [
        [("../out.py", "x")],
        [("a/../../out.py", "x")],
        [("/tmp/out.py", "x")],  # noqa: S108 - a name inside a zip
        [("c:/out.py", "x")],
        [("a\\out.py", "x")],
        [("./out.py", "x")],
        [("a//out.py", "x")],
        [("folder/", "")],
        [(link_entry(), "/etc/passwd")],
        [("a.py", "x"), ("A.py", "y")],
        [("a", "x"), ("a/b", "y")],
        [("a" * 300, "x")],
        [("/".join("a" * 30), "x")],
    ],
    ids=lambda entries: str(entries[-1][0])[:20],
)
def test_names_that_would_do_harm_are_refused_and_leave_nothing(tmp_path, entries):
    file = zip_of(tmp_path / "evil.zip", *entries)
    with pytest.raises(ProtocolError, match="bundle holds"):
        unpack_bundle(file, tmp_path / "deep" / "there")
    assert list((tmp_path / "deep").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"evil.zip", "deep"}


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(bundle.MAX_BUNDLE_BYTES + 1))
    with pytest.raises(ProtocolError, match="above the limits"):
        unpack_bundle(tmp_path / "bomb.zip", tmp_path / "there")


def test_a_zip_that_understates_its_size_yields_no_more_than_it_said(tmp_path):
    file = tmp_path / "liar.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 20))
    file.write_bytes(file.read_bytes().replace((1 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(ProtocolError, match="not a complete zip"):
        unpack_bundle(file, tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["liar.zip"]


def test_other_compressions_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.py", "x")
    with pytest.raises(ProtocolError, match="compressed by an unknown method"):
        unpack_bundle(tmp_path / "b.zip", tmp_path / "there")


def test_a_bundle_cut_off_or_damaged_is_refused(folder, tmp_path):
    data = pack_bundle(str(folder)).data
    middle = len(CODE) // 2
    for name, broken in {
        "cut": data[:-40],
        "none": b"",
        "flip": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
    }.items():
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ProtocolError, match="not a complete zip"):
            unpack_bundle(tmp_path / name, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_text("kept")
    unpack_bundle(tmp_path / "not even read", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["kept"]


def test_names_that_move_a_cursor_or_cannot_be_read_are_refused(tmp_path):
    odd = zip_of(tmp_path / "odd.zip", ("a\x1b[2J.py", b"x"))
    with pytest.raises(ProtocolError, match="control characters"):
        unpack_bundle(odd, tmp_path / "odd")
    data = zip_of(tmp_path / "utf.zip", ("süß.py", b"x")).read_bytes()
    (tmp_path / "utf.zip").write_bytes(data.replace("ü".encode(), b"\xff\xff"))
    with pytest.raises(ProtocolError, match="not a complete zip file"):
        unpack_bundle(tmp_path / "utf.zip", tmp_path / "utf")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["odd.zip", "utf.zip"]
