"""`edgefl cloud train-stage`: its options reach the server, and a home without a cloud is named."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from cloud.cli import cloud
from edgefl.errors import EdgeflError


def test_a_home_without_a_cloud_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cloud, ["train-stage", "--home", str(tmp_path / "none")])
    assert done.exit_code != 0
    assert isinstance(done.exception, EdgeflError | SystemExit)


def test_without_tls_only_loopback_is_possible(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cloud,
        ["train-stage", "--home", str(tmp_path), "--host", "0.0.0.0", "--insecure"],  # noqa: S104
    )
    assert "--insecure is for loopback only" in str(done.exception)


def test_its_help_says_what_it_runs() -> None:
    said = CliRunner().invoke(cloud, ["train-stage", "--help"]).output
    assert "train.split.server" in said
    assert "--device-cache-mb" in said
