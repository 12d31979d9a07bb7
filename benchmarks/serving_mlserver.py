"""The benchmark's model in MLServer, as its documentation describes a custom runtime.

MLServer has no runtime for ONNX and pins older versions of our own packages, so it has its own environment:
`make bench` makes it in .venv/mlserver from benchmarks/mlserver.lock.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

PYTHON = Path(__file__).parents[1] / ".venv" / "mlserver" / "bin" / "python"
RUNTIME = Path(__file__).with_name("serving_mlserver_cnn.py")


def version() -> str | None:
    """Return MLServer's version; None where it is not installed."""
    if not PYTHON.exists():
        return None
    ask = "import importlib.metadata as m; print(next((d.version for d in m.distributions(name='mlserver')), ''))"
    return subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True).stdout.strip() or None


def write_server(folder: Path, model: Path, http: int, grpc: int, metrics: int) -> list[str | Path]:
    """Write a folder for `mlserver start` with its three ports, and return the command.

    `parallel_workers` is 0: the model runs in the server's process, which is the fastest for one small model.
    """
    folder.mkdir()
    shutil.copy(RUNTIME, folder / "cnn_runtime.py")
    server = {
        "host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics,
        "parallel_workers": 0, "debug": False,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(server))
    described = {"name": "cnn", "implementation": "cnn_runtime.Cnn", "parameters": {"uri": str(model)}}
    (folder / "model-settings.json").write_text(json.dumps(described))
    return [PYTHON.with_name("mlserver"), "start", folder]
