"""An edgefl fleet for a benchmark: a cloud with its embedded broker and K agents, real processes over TLS."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.workload import RunFailedError
from edgefl.errors import EdgeflError
from edgefl.local_fleet import LocalFleet

START_S = 120.0
ECHO = Path(__file__).parent / "echo_task"
# server.lr of an echo, whose update is the model itself: every round has a new model to send, and it stays finite.
ECHO_LR = 1e-3


@contextmanager
def connected_fleet(num_agents: int, *agent_options: str) -> Iterator[LocalFleet]:
    """Start a cloud and agents in a temporary folder and wait until all agents are connected.

    Raises RunFailedError for every failure of the fleet, also inside the context.
    """
    with tempfile.TemporaryDirectory(prefix="edgefl-", ignore_cleanup_errors=True) as folder:
        try:
            with LocalFleet(Path(folder)) as fleet:
                fleet.start()
                names = [f"agent-{index}" for index in range(num_agents)]
                for name in names:
                    fleet.enroll(name)
                agents = [fleet.start_agent(name, *agent_options) for name in names]
                for agent in agents:
                    agent.wait_for("mqtt.up", START_S)
                yield fleet
        except (EdgeflError, subprocess.TimeoutExpired) as cause:
            raise RunFailedError(str(cause)) from cause


def run_job(
    fleet: LocalFleet, task: Path, *, rounds: int, settings: Mapping[str, object], deadline_s: float
) -> dict[str, Any]:
    """Run a task to its end with `edgefl run`; return the content of its JSON."""
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    file = fleet.folder / "run.json"
    fleet.command("run", task, "--cloud", fleet.url, "--rounds", rounds, "--json", file, *options, timeout_s=deadline_s)
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def echo_task(folder: Path, model_bytes: int, tensors: int) -> Path:
    """Write the echo task for a model of this size into `folder`."""
    task = folder / "echo"
    shutil.copytree(ECHO, task, ignore=shutil.ignore_patterns("__pycache__"))
    text = (task / "echo.py").read_text(encoding="utf-8")
    for name, value in (("MODEL_BYTES", model_bytes), ("TENSORS", tensors)):
        text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, count=1, flags=re.MULTILINE)
    (task / "echo.py").write_text(text, encoding="utf-8")
    return task
