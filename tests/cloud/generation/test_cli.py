"""`edgefl cloud generate`, as it is typed."""

from __future__ import annotations

from click.testing import CliRunner

from cloud.cli import cloud
from edgefl.errors import ConfigError, HomeError


def test_what_cannot_start(tmp_path) -> None:
    for arguments, kind, words in (
        (["--home", str(tmp_path / "none")], HomeError, "no home.json"),
        (["--home", str(tmp_path), "--insecure", "--host", "10.0.0.1"], ConfigError, "--insecure is for loopback only"),
        (["--home", str(tmp_path), "--engine", "jax"], ConfigError, "--engine 'jax' is unknown"),
    ):
        done = CliRunner().invoke(cloud, ["generate", str(tmp_path), *arguments])
        assert isinstance(done.exception, kind), done.exception
        assert words in str(done.exception)


def test_a_folder_that_is_missing_is_told_by_name(tmp_path) -> None:
    done = CliRunner().invoke(cloud, ["generate", str(tmp_path / "none"), "--home", str(tmp_path)])
    assert done.exit_code == 2
    assert "does not exist" in done.output
