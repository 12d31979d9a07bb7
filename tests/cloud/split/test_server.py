"""The server's options and its home; what it serves is tested with real processes (tests/e2e)."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud.split.server import SplitServer, SplitServerOptions
from edgefl.errors import ConfigError, HomeError


def test_it_needs_the_home_of_a_cloud(tmp_path: Path) -> None:
    with pytest.raises(HomeError):
        SplitServer(SplitServerOptions(home=tmp_path / "none"))


def test_without_tls_only_loopback_is_possible(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--insecure is for loopback only, --host is 10.0.0.1"):
        SplitServerOptions(home=tmp_path, host="10.0.0.1", insecure=True)
    SplitServerOptions(home=tmp_path, insecure=True)
