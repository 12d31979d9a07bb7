"""Installing: every refusal before a change, and a real installation into an image, and back."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_agent.install import service as installing
from edge_agent.install.service import install, install_files, uninstall, uninstall_files
from edge_agent.install.units import AGENT, SYSUSERS, UNIT_FOLDER, UNITS, Installation
from edge_agent.link.profile import Profile, save_profile
from edgefl.errors import ConfigError, HomeError, InstallError
from edgefl.process.home import create_home
from edgefl.protocols.tls import write_private

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may install")
needs_systemd = pytest.mark.skipif(shutil.which("systemctl") is None, reason="systemd is not installed here")


def enrolled(home: Path) -> Path:
    create_home(home, "agent")
    profile = Profile(device="pi-4", cloud_url="https://c:9480", grpc="c:9440", broker="mqtts://c:8883")
    save_profile(home, profile)
    write_private(home / "key.pem", b"key")
    return home


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root folder with an enrolled home, as in an image for many devices."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tmp_path / "etc" / "group").write_text("root:x:0:\n")
    enrolled(tmp_path / "var" / "lib" / "edgefl")
    return tmp_path


def tree(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(install, [str(argument) for argument in arguments])


def test_a_dry_run_prints_every_file_and_changes_nothing(tmp_path: Path) -> None:
    result = invoke("--dry-run", "--home", "/srv/fl", "--data", "part=3", "--data", "path=/srv/a b", "--root", tmp_path)
    assert result.exit_code == 0, result.output
    for name in UNITS:
        assert f"# ---- /etc/systemd/system/{name}\n" in result.output
    assert "--home /srv/fl" in result.output
    assert '--data part=3 --data "path=/srv/a b"' in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["part", "=3"])
def test_a_data_option_that_is_no_pair_is_named(option: str) -> None:
    result = invoke("--dry-run", "--data", option)
    assert isinstance(result.exception, ConfigError)
    assert f"--data {option!r} is not of the form key=value" in str(result.exception)


def test_help_has_an_example() -> None:
    for command in (install, uninstall):
        assert "Example:\n    edgefl agent" in CliRunner().invoke(command, ["--help"]).output


def test_without_root_it_says_sudo(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    before = tree(image)
    for act in (lambda: install_files(Installation(), image), lambda: uninstall_files(image, purge=True)):
        with pytest.raises(InstallError, match="needs root: run it again with sudo"):
            act()
    assert tree(image) == before


@needs_root
def test_without_systemd_it_says_what_to_do(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(image))
    with pytest.raises(InstallError, match=r"this host does not use systemd; .* `edgefl agent start`"):
        install_files(Installation(), image)


@needs_root
@needs_systemd
@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd runs this host")
def test_in_a_container_it_says_what_to_do() -> None:
    with pytest.raises(InstallError, match=r"systemd does not run this host \(a container\?\)"):
        install_files(Installation(), Path("/"))


@needs_root
@needs_systemd
def test_a_device_that_is_not_enrolled_is_shown_the_line(tmp_path: Path) -> None:
    with pytest.raises(HomeError) as refusal:
        install_files(Installation(), tmp_path)
    assert "no home.json" in str(refusal.value)
    assert "edgefl agent enroll --home /var/lib/edgefl --cloud https://HOST:9480 --token TOKEN" in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@needs_root
@needs_systemd
def test_an_image_is_installed_enabled_and_given_to_its_user(image: Path) -> None:
    install_files(Installation(), image)
    files = tree(image)
    assert "edgefl:x:" in files["etc/passwd"]
    for name in UNITS:
        path = image / "etc/systemd/system" / name
        assert path.stat().st_mode & 0o777 == 0o644
    assert files["etc/systemd/system/multi-user.target.wants/edgefl-agent.service"].endswith(AGENT)
    assert files["etc/systemd/system/sockets.target.wants/edgefl-trainer.socket"].endswith("edgefl-trainer.socket")
    home = image / "var/lib/edgefl"
    uid = int(next(line for line in files["etc/passwd"].splitlines() if line.startswith("edgefl:")).split(":")[2])
    assert uid != 0
    assert {path.stat().st_uid for path in (home, *home.rglob("*"))} == {uid}
    assert (home / "key.pem").stat().st_mode & 0o777 == 0o600


@needs_root
@needs_systemd
def test_installing_again_takes_up_what_changed(image: Path) -> None:
    install_files(Installation(), image)
    first = tree(image)
    install_files(Installation(), image)
    assert tree(image) == first
    install_files(Installation(data={"part": "4"}), image)
    assert "--data part=4" in (image / "etc/systemd/system" / AGENT).read_text()


@needs_root
@needs_systemd
def test_uninstalling_leaves_the_home_and_says_so(image: Path) -> None:
    before = set(tree(image))
    install_files(Installation(), image)
    said = uninstall_files(image, purge=False)
    assert "Kept: /var/lib/edgefl (keys, certificate, models) and its owner 'edgefl'." in said
    left = {name for name in tree(image) if "systemd" in name}
    assert left == set()
    assert before <= set(tree(image))


@needs_root
@needs_systemd
def test_purging_leaves_nothing(image: Path) -> None:
    install_files(Installation(), image)
    result = CliRunner().invoke(uninstall, ["--purge", "--root", str(image)])
    assert result.exit_code == 0, result.output
    assert "Removed: /var/lib/edgefl." in result.output
    assert "edgefl" not in (image / "etc/passwd").read_text()
    assert not (image / "var/lib/edgefl").exists()
    assert not [name for name in tree(image) if "edgefl" in name]


@needs_root
@needs_systemd
def test_a_user_that_was_there_before_stays(image: Path) -> None:
    with (image / "etc/passwd").open("a") as passwd:
        passwd.write("pi:x:1000:1000::/home/pi:/bin/sh\n")
    install_files(Installation(user="pi"), image)
    assert not (image / SYSUSERS.relative_to("/")).exists()
    assert (image / "var/lib/edgefl/key.pem").stat().st_uid == 1000
    uninstall_files(image, purge=True)
    assert "pi:x:1000" in (image / "etc/passwd").read_text()


@needs_root
@needs_systemd
def test_a_folder_that_is_no_home_is_never_purged(image: Path) -> None:
    install_files(Installation(), image)
    unit = image / UNIT_FOLDER.relative_to("/") / AGENT
    unit.write_text(unit.read_text().replace("WorkingDirectory=/var/lib/edgefl", "WorkingDirectory=/etc"))
    with pytest.raises(HomeError):
        uninstall_files(image, purge=True)
    assert (image / "etc" / "passwd").exists()


@needs_root
@needs_systemd
def test_there_is_nothing_to_uninstall(image: Path) -> None:
    with pytest.raises(InstallError, match="no agent is installed here"):
        uninstall_files(image, purge=False)


@needs_root
def test_a_user_who_cannot_run_the_interpreter_is_told() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        python = Path(folder) / "python"
        python.write_text("#!/bin/sh\necho ModuleNotFoundError: edge_agent >&2\nexit 1\n")
        python.chmod(0o755)
        with pytest.raises(InstallError, match=r"cannot run .*Permission denied.*Install edgefl where all can read it"):
            installing._require_runnable(Installation(python=python), (65534, 65534))
        python.parent.chmod(0o755)
        with pytest.raises(InstallError, match=r"cannot run .*ModuleNotFoundError: edge_agent.*/opt/edgefl"):
            installing._require_runnable(Installation(python=python), (65534, 65534))


def test_a_command_that_fails_is_shown_with_its_words() -> None:
    with pytest.raises(InstallError, match=r"`sh -c echo no >&2; exit 3` failed: no\."):
        installing._run("sh", "-c", "echo no >&2; exit 3")
    with pytest.raises(InstallError, match="there is no a-command-that-is-not on this host"):
        installing._run("a-command-that-is-not")


def test_a_user_that_cannot_be_made_is_named(image: Path) -> None:
    with pytest.raises(ConfigError, match="--user 'gone' could not be made"):
        installing._owner(image, "gone")
