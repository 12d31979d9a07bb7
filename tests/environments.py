"""Virtual environments by uv, which installs by links, so that a test can afford a hundred of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ("--constraint", str(ROOT / "requirements.lock"))
# uv takes what pip has on this machine, so that it need not fetch a larger build of torch.
ENVIRONMENT = {**os.environ, "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""), "UV_LINK_MODE": "hardlink"}

# Imports the command line once, and runs each command in a fork: the import takes longer than most commands.
_FORKS = """
import json, os, sys, tempfile
from edgefl.app.cli import main
for line in sys.stdin:
    with tempfile.TemporaryFile() as said:
        if (pid := os.fork()) == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.argv = ["edgefl", *json.loads(line)]
            main()
            sys.exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        print(json.dumps([status, said.read().decode(errors="replace")]), flush=True)
"""


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

    def edgefl_each(
        self, commands: Sequence[Sequence[str]], cwd: Path, env: Mapping[str, str | Path] | None = None
    ) -> list[tuple[int, str]]:
        """Run commands one after another, each in a process of its own; return each one's exit status and output."""
        env = {**ENVIRONMENT, "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **(env or {})}
        lines = "".join(f"{json.dumps(list(one))}\n" for one in commands)
        done = subprocess.run(
            [self.python, "-P", "-c", _FORKS], input=lines, capture_output=True, text=True, timeout=900, check=True,
            cwd=cwd, env=env,
        )  # fmt: skip
        return [(status, said) for status, said in map(json.loads, done.stdout.splitlines())]

    @staticmethod
    def _uv(*arguments: str | Path) -> None:
        uv = Path(sys.executable).with_name("uv")
        done = subprocess.run(
            [uv, "--quiet", *arguments], capture_output=True, text=True, timeout=900, check=False, env=ENVIRONMENT
        )
        assert done.returncode == 0, f"uv {' '.join(map(str, arguments))}: {done.stderr}"
