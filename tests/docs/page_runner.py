"""Runs the commands of a page as a reader would, in a home and a folder of their own, with real processes.

What a reader fills in or does beside the commands is done here: placeholders get their values, `edgefl cloud token`
is written into token.txt, operator.json is copied, and commands that run until they are stopped run in the background.
Ports are free ones. Nothing else of a command is changed, except what `SHORTER` says.
Invariant: after `close`, no process of the page is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from edgefl.local_fleet import QUIET, LoggedProcess, free_ports
from tests.docs.pages import ROOT

COMMAND_S = 900.0  # splitting a language model takes long on a busy machine
# What would take minutes, and says nothing more in that time; everything else runs as it is written.
SHORTER = {
    "--rounds 500": "--rounds 5",
    "--clients 1000 --rounds 20": "--clients 1000 --rounds 3",
    "--config examples/digits/config.toml --set rounds.clients=100 --clients 1000":
        "--config examples/digits/config.toml --set rounds.clients=100 --set rounds.count=2 --clients 1000",
}  # fmt: skip
RUNNING = {  # a command that runs until it is stopped -> what it says when it serves
    "edgefl cloud generate": "tail.ready",
    "edgefl cloud start": "cloud.ready",
    "edgefl agent start": "mqtt.up",
    "mosquitto -c": " running",
}
_HOME = re.compile(r"--home (\S+)")


class PageRunner:
    """One page's commands; each `run` is a shell of its own in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.home, self.folder, self.root = folder / "home", folder / "clone", folder / "root"
        for one in (self.home / ".config" / "edgefl", self.root):
            one.mkdir(parents=True)
        shutil.copytree(ROOT / "examples", self.folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        self._ports = dict(zip(("grpc", "http", "mqtt", "tail"), free_ports(4), strict=True))
        self._running: dict[str, LoggedProcess] = {}  # by role: a cloud, a broker, or the agent of a home
        self._env = {
            **os.environ, **QUIET,
            "HOME": str(self.home), "XDG_STATE_HOME": str(self.home / "state"), "FLWR_HOME": str(self.home / "flwr"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "PAGE_ROOT": str(self.root), "OMP_NUM_THREADS": "1",
            # Models are downloaded once for all pages.
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
        }  # fmt: skip
        self._env.pop("EDGEFL_CREDENTIALS", None)
        self._placeholders: Mapping[str, Callable[[], str]] = {
            r"(?<=//)CLOUD:9480": self._cloud,
            r"broker\.example\.org:8883": lambda: f"127.0.0.1:{self._ports['mqtt']}",
            r"localhost:8000": self._serving,
            r"localhost:9460": lambda: f"localhost:{self._ports['tail']}",
            r"\bTOKEN\b": lambda: (self.folder / "token.txt").read_text("utf-8").strip(),
            r"\bJOB\b": self._newest_job,
            r"\b3f9a0c\b": self._unused_token,
            r"(?<![\w.])(?=/(?:srv|var/lib|data|opt)/)": lambda: str(self.root),
        }

    def run(self, line: str) -> str:
        """Run a command and return what it printed to stdout, or start it in the background; fails if it fails."""
        line = self._filled_in(line.partition("    # ")[0].strip())
        if line.startswith("edgefl agent install"):
            self._shell(f"{line} --dry-run")
            return self.run(line.replace(" install", " start"))  # what the service would run
        if (said := next((RUNNING[one] for one in RUNNING if line.startswith(one)), None)) is not None:
            self._start(line, said)
            return ""
        if line.startswith("edgefl cloud broker-config"):
            line += f" --port {self._ports['mqtt']}"
        printed = self._shell(line)
        if line.startswith("edgefl cloud token "):
            (self.folder / "token.txt").write_text(printed)
        if line.startswith("edgefl cloud broker-config") and os.geteuid() == 0:
            with (self._home_in(line) / "mosquitto" / "mosquitto.conf").open("a", encoding="utf-8") as config:
                config.write("user root\n")  # as the command says: else it becomes a user who cannot read the folder
        return printed

    def close(self) -> None:
        """Stop everything that the page started; fails if a process is left."""
        for process in reversed(self._running.values()):
            process.stop()
        self._shell("edgefl local stop")
        left = [one.info for one in psutil.process_iter(["pid", "cmdline"]) if self._is_ours(one.info["cmdline"])]
        assert left == []

    def _is_ours(self, command: list[str] | None) -> bool:
        return str(self.home.parent) in " ".join(command or ())

    def _filled_in(self, line: str) -> str:
        line = line.replace("sudo /opt/edgefl/bin/edgefl", "edgefl")
        for long, short in SHORTER.items():
            line = line.replace(long, short)
        for pattern, value in self._placeholders.items():
            if re.search(pattern, line):
                line = re.sub(pattern, value().replace("\\", r"\\"), line)
        return line

    def _shell(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self._env, capture_output=True, text=True, check=False,
            timeout=COMMAND_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\nexit status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _start(self, line: str, said: str) -> None:
        role = "broker"
        if line.startswith("edgefl cloud start"):
            role = "cloud"
            line += f" --grpc-port {self._ports['grpc']} --http-port {self._ports['http']}"
            line += "" if "--broker mqtt" in line else f" --mqtt-port {self._ports['mqtt']}"
        elif line.startswith("edgefl cloud generate"):
            role = "tail"
            line += f" --port {self._ports['tail']}"
        elif line.startswith("edgefl agent start"):
            role = str(self._home_in(line))
            line += " --serve-port 0"
        for before in (role, "cloud") if role == "broker" else (role,):  # a broker of one's own replaces the cloud's
            if before in self._running:
                self._running.pop(before).stop()
        command = ["bash", "-c", f"cd {self.folder} && exec {line}"]
        log = self.root / f"{len(list(self.root.glob('*.log')))}-{role.replace('/', '-')}.log"
        self._running[role] = LoggedProcess(command, log, self._env)
        self._running[role].wait_for(said)
        if role == "cloud":
            target = self.home / ".config" / "edgefl" / "operator.json"
            shutil.copy(self._home_in(line) / "operator.json", target)

    def _home_in(self, line: str) -> Path:
        found = _HOME.search(line)
        assert found is not None, line
        return self.folder / found[1].replace("~", str(self.home), 1)

    def _local(self) -> Path:
        return self.home / "state" / "edgefl" / "local"

    def _cloud(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return str(json.loads((self._local() / "state.json").read_text("utf-8"))["url"]).removeprefix("https://")
        return f"127.0.0.1:{self._ports['http']}"

    def _serving(self) -> str:
        files = (self.root / "var/lib/edgefl/serving", self._local() / "local-0" / "serving")
        (file,) = [one for one in files if one.exists()]
        return file.read_text("ascii").strip().removeprefix("http://").replace("127.0.0.1", "localhost")

    def _newest_job(self) -> str:
        return str(json.loads(self._shell("edgefl jobs list --json -"))[0]["id"])

    def _unused_token(self) -> str:
        tokens = json.loads(self._shell(f"edgefl cloud tokens list --home {self.root}/srv/edgefl --json -"))
        return str(next(one["id"] for one in tokens if one["state"] == "open"))
