"""What goes into a bundle: modules and small texts; what is left out is named; `include` asks for more."""

import os

import pytest

from edgefl.bundle import pack_bundle, selection
from edgefl.bundle.selection import LeftOut, left_out_text, select_files, size_text
from edgefl.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "project"
    write(root, "task.py", "task = 1")
    include(root, None)
    return root


def write(root, name, content=""):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def include(root, patterns):
    line = "" if patterns is None else f"include = {patterns}\n"
    write(root, "pyproject.toml", f'[tool.edgefl]\ntask = "task:task"\n{line}')


def test_modules_and_small_texts_go(folder):
    for name in ("words.txt", "part/labels.json", "part/README.md"):
        write(folder, name, "x")
    write(folder, "large.py", b"#" * 1_000_001)
    chosen = select_files(folder)
    assert sorted(chosen.files) == [
        "large.py", "part/README.md", "part/labels.json", "pyproject.toml", "task.py", "words.txt",
    ]  # fmt: skip
    assert chosen.left_out == ()


def test_what_does_not_belong_is_named_with_its_size(folder):
    write(folder, "plot.png", b"1" * 1500)
    write(folder, "notes.ipynb", b"2")
    write(folder, "huge.txt", b"3" * 1_000_001)
    write(folder, "wandb/run/x.txt", b"4")
    write(folder, "data/a.csv", b"5" * 10)
    write(folder, "data/more/b.npz", b"6" * 20)
    chosen = select_files(folder)
    assert sorted(chosen.files) == ["pyproject.toml", "task.py"]
    assert set(chosen.left_out) == {
        LeftOut("plot.png", "a picture", 1500),
        LeftOut("notes.ipynb", "a notebook", 1),
        LeftOut("huge.txt", "more than 1 MB", 1_000_001),
        LeftOut("wandb/run/x.txt", "output of another tool", 1),
        LeftOut("data/", "2 files, data", 30),
    }
    assert pack_bundle(str(folder)).left_out == chosen.left_out
    assert left_out_text(chosen.left_out) == (
        "not sent to devices: huge.txt (more than 1 MB, 1.0 MB), plot.png (a picture, 1.5 kB), "
        "data/ (2 files, data, 0.0 kB), notes.ipynb (a notebook, 0.0 kB), wandb/run/x.txt (output of another tool, "
        '0.0 kB). If the task needs a file there, name it in pyproject.toml: [tool.edgefl] include = ["huge.txt"]'
    )
    assert left_out_text(()) == ""


def test_a_folder_that_is_packed_in_part_is_not_named_as_a_whole(folder):
    for name in ("part/a.csv", "part/b.csv", "part/read.py"):
        write(folder, name)
    assert {one.name for one in select_files(folder).left_out} == {"part/a.csv", "part/b.csv"}


@pytest.mark.parametrize(
    ("patterns", "asked"),
    [
        (["data/a.csv"], {"data/a.csv"}),
        (["data/*.csv"], {"data/a.csv"}),
        (["data/**"], {"data/a.csv", "data/deep/b.csv"}),
        (["data/"], {"data/a.csv", "data/deep/b.csv"}),
        (["data"], {"data/a.csv", "data/deep/b.csv"}),
        (["**/?.csv"], {"data/a.csv", "data/deep/b.csv", "c.csv"}),
        (["[ac].csv", "data/deep/[!a].csv"], {"c.csv", "data/deep/b.csv"}),
    ],
)
def test_what_is_asked_for_goes(folder, patterns, asked):
    for name in ("data/a.csv", "data/deep/b.csv", "c.csv"):
        write(folder, name, b"1")
    include(folder, patterns)
    assert set(select_files(folder).files) == {"pyproject.toml", "task.py"} | asked


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["*.csv", "words/*.txt"], r"include: '\*.csv' matches no file of the folder\. .*hidden files"),
        ([".env"], "include: '.env' matches no file"),
        ([".git/config"], "matches no file"),
        (["../outside.csv"], "leads out of the folder"),
        (["/etc/passwd"], "leads out of the folder"),
        ("'data'", "include is 'data'; expected a list of patterns"),
        ([1], r"include is \[1\]; expected a list"),
        ([""], r"expected a list"),
    ],
)
def test_an_include_that_cannot_be_meant(folder, patterns, message):
    write(folder, ".env", "SECRET")
    write(folder, ".git/config", "x")
    include(folder, patterns)
    with pytest.raises(ConfigError, match=message):
        select_files(folder)


def test_an_include_of_two_gigabytes_is_refused_by_its_size_and_is_not_read(folder):
    with (folder / "big.bin").open("wb") as file:
        file.truncate(2 << 30)  # takes no space
    include(folder, ["big.bin"])
    with pytest.raises(ConfigError, match=r"2048\.0 MiB in 3 files; a bundle may hold 64 MiB.*big\.bin \(2\.1 GB\)"):
        pack_bundle(str(folder))


def test_links_that_lead_nowhere_or_round_in_a_circle(folder):
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    with pytest.raises(ConfigError, match=r"project/a is a link that leads to no file, or to itself"):
        select_files(folder)


def test_a_folder_that_links_to_its_own_parent(folder):
    (folder / "part").mkdir()
    (folder / "part" / "up").symlink_to(folder)
    with pytest.raises(ConfigError, match=r"part/up is a link to a folder; copy the files"):
        select_files(folder)


def test_a_link_to_a_file_is_packed_as_that_file(folder, tmp_path):
    write(tmp_path, "shared.py", "shared = 1")
    (folder / "shared.py").symlink_to(tmp_path / "shared.py")
    assert select_files(folder).files["shared.py"].read_text() == "shared = 1"


def test_a_folder_of_very_many_files_is_not_walked_to_its_end(folder, monkeypatch):
    monkeypatch.setattr(selection, "MAX_SEEN", 50)
    (folder / "pictures").mkdir()
    for n in range(50):
        (folder / "pictures" / f"{n}.png").touch()
    with pytest.raises(ConfigError, match=r"more than 50 files and folders\. Keep data outside the task's folder"):
        select_files(folder)


def test_a_special_file_is_left_alone(folder):
    os.mkfifo(folder / "pipe")
    assert sorted(select_files(folder).files) == ["pyproject.toml", "task.py"]


def test_a_flower_apps_own_includes_go_too_and_need_not_match(folder):
    write(folder, "vocabulary.csv", b"1")
    app = '[tool.flwr.app]\npublisher = "me"\nfab-include = ["/vocabulary.csv", "no/such.csv"]\n'
    write(folder, "pyproject.toml", app)
    assert "vocabulary.csv" in select_files(folder).files


def test_sizes():
    assert [size_text(number) for number in (12, 1_500_000, 2_100_000_000)] == ["0.0 kB", "1.5 MB", "2.1 GB"]
