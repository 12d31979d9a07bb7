"""Virtual environments by uv, which installs by links, so that a test can afford a hundred of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ("--constraint", str(ROOT / "requirements.lock"))
# uv takes what pip has on this machine, so that it need not fetch a larger build of torch.
ENVIRONMENT = {**os.environ, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""), "UV_LINK_MODE": "hardlink"}


class Environment:
    """One of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._uv("venv", "--python", sys.executable, folder)

    def install(self, *arguments: str | Path) -> None:
        self._uv("pip", "install", "--python", self.python, *arguments)

    def check(self) -> None:
        """What pip's own check says."""
        self._uv("pip", "check", "--python", self.python)

    def edgefl(
        self, *arguments: str, cwd: Path, env: Mapping[str, str | Path] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [self.folder / "bin" / "edgefl", *arguments]
        env = {**ENVIRONMENT, "COLUMNS": "200", **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=env)

    @staticmethod
    def _uv(*arguments: str | Path) -> None:
        uv = Path(sys.executable).with_name("uv")
        done = subprocess.run(
            [uv, "--quiet", *arguments], capture_output=True, text=True, timeout=900, check=False, env=ENVIRONMENT
        )
        assert done.returncode == 0, f"uv {' '.join(map(str, arguments))}: {done.stderr}"
