"""Flower on this machine, as users start it: a SuperLink, K SuperNodes, `flwr run`; no TLS.

Only the ports are not the default: ServerApp and ClientApps run as subprocesses of their SuperExecs. Telemetry
and the check for updates are off. A round lasts from the previous round's end to its own, in the ServerApp.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.family import Family
from benchmarks.memory import peak_rss_mb, tree_rss_mb
from benchmarks.report import installed
from benchmarks.workload import TENSORS, RunFailedError, RunResult, Workload, between
from edgefl.errors import ProcessFailed
from edgefl.local_fleet import LoggedProcess, free_ports

START_S = 120.0  # twenty Python processes on two cores start slowly
APP = Path(__file__).parent / "flower_app"
_BIN = Path(sys.executable).parent
# The function behind `flwr run`.
_SUBMIT = """
import sys
from flwr.cli.run.run import run
run(app=sys.argv[1], superlink="bench", federation=None, run_config_overrides=[sys.argv[2]],
    federation_config_overrides=None, stream=True, output_format="default")
"""


def name() -> str | None:
    """Return Flower's name and version, or None if it is not installed."""
    version = installed("flwr")
    return f"Flower {version}" if version else None


def run(workload: Workload, rounds: int, deadline_s: float) -> RunResult:
    """Run `rounds` rounds after the first; raises RunFailedError."""
    with tempfile.TemporaryDirectory(prefix="flower-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        with Family(folder, _environment(folder)) as family:
            try:
                return _run(family, workload, rounds, deadline_s)
            except (ProcessFailed, subprocess.TimeoutExpired) as cause:
                raise RunFailedError(str(cause)) from cause


def _run(family: Family, workload: Workload, rounds: int, deadline_s: float) -> RunResult:
    ports = free_ports(1 + workload.clients)
    superlink = family.start("superlink", [_BIN / "flower-superlink", "--insecure", "--port", str(ports[0])])
    superlink.wait_for("Starting Flower SuperExec", START_S)
    address = f"127.0.0.1:{ports[0]}"
    _write_config(family.folder, address)
    nodes = [_start_node(family, address, port) for port in ports[1:]]
    for node in nodes:
        node.wait_for("Starting Flower SuperExec", START_S)
    idle_mb = tree_rss_mb(nodes[0].pid)
    report = family.folder / "report.json"
    settings = (
        f"clients={workload.clients} rounds={rounds + 1} model-bytes={workload.model_bytes} tensors={TENSORS} "
        f'deadline-s={deadline_s} report="{report}"'
    )
    submit = family.start("run", [sys.executable, "-c", _SUBMIT, str(APP), settings])
    submit.wait_for("Strategy execution finished", deadline_s)
    submit.popen.wait(START_S)  # its streamed log ends with the run
    return result_of(report, workload, superlink_mb=peak_rss_mb(superlink.pid), idle_mb=idle_mb)


def _start_node(family: Family, superlink: str, port: int) -> LoggedProcess:
    options = ("--insecure", "--superlink", superlink, "--port", str(port))
    return family.start(f"supernode-{port}", [_BIN / "flower-supernode", *options])


def result_of(file: Path, workload: Workload, *, superlink_mb: float, idle_mb: float) -> RunResult:
    """Read the ServerApp's report; raises RunFailedError if a client is missing in a round."""
    if not file.exists():
        raise RunFailedError(f"Flower's run of {workload} left no report: its ServerApp failed")
    report = json.loads(file.read_text(encoding="utf-8"))
    if set(report["replies"]) != {workload.clients}:
        raise RunFailedError(f"Flower's run of {workload} had {report['replies']} replies in its rounds")
    first_s, round_s = between(report["ends_s"])
    server_app_mb = report["peak_rss_kib"] * 1024 / 1e6
    return RunResult(first_s=first_s, round_s=round_s, centre_mb=superlink_mb + server_app_mb, idle_mb=idle_mb)


def _write_config(folder: Path, address: str) -> None:
    config = f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "{address}"\ninsecure = true\n'
    (folder / "config.toml").write_text(config, encoding="utf-8")


def _environment(folder: Path) -> dict[str, str]:
    """Return an environment in which Flower keeps its files in `folder`, and finds its commands by PATH."""
    return {"FLWR_HOME": str(folder), "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
