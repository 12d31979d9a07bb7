"""The example of the page on split models, by its own commands: a cloud, a region, two devices and a stage server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from edgefl.local_fleet import LoggedProcess
from edgefl.task import load_task
from tests.docs.pages import DOCS, ROOT, blocks

FIRST = "edgefl local start --devices 2 --regions 1"
STAGES, CURL = "edgefl cloud stages", "curl "
HELD_OUT = 100


def commands() -> list[str]:
    page = {"offload.md": (DOCS / "offload.md").read_text("utf-8")}
    (block,) = [one for one in blocks(page, "sh") if one.text.startswith(FIRST)]
    return block.text.splitlines()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_devices_below_a_region_share_a_model_with_the_cloud(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HOME": str(tmp_path)}
    for name in ("EDGEFL_CREDENTIALS", "XDG_STATE_HOME"):
        env.pop(name, None)

    def run(line: str) -> str:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)  # noqa: S602 - our page
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    server, urls = None, {}
    try:
        for line in commands():
            if line.startswith(STAGES):
                command = ["bash", "-c", f"cd {tmp_path} && exec {line}"]
                server = LoggedProcess(command, tmp_path / "stages.log", env)
                server.wait_for("stages.ready")
            elif line.startswith(CURL):
                urls = json.loads(run("edgefl local status --json -"))["devices"]
                stats = json.loads(run(line.replace("localhost:8000", urls["local-0"].removeprefix("http://"))))
                assert stats["model_stats"][0]["placement"]["current"] == "split:node_max_pool2d"
            else:
                run(line)
        assert len(urls) == 2
        for url in urls.values():
            assert accuracy(url, "split:node_max_pool2d") >= 0.85
        for name in urls:
            slot = tmp_path / ".local/state/edgefl/local" / name / "models/digits/a"
            sizes = {one.name: one.stat().st_size for one in slot.iterdir()}
            assert "model.onnx" not in sizes
            assert sum(sizes.values()) < 2_000_000  # the model has 17 MB
        server.kill()
        for url in urls.values():
            assert accuracy(url, "fallback") >= 0.75
    finally:
        if server is not None:
            server.stop()
        run("edgefl local stop")


def accuracy(url: str, by: str) -> float:
    """Return the accuracy of a device on held-out digits, once the answers come from this placement."""
    pictures, labels = (one[:HELD_OUT] for one in load_task(str(ROOT / "examples" / "offload")).test_data())
    tensor = {"name": "input", "datatype": "FP32", "shape": [*pictures.shape], "data": pictures.ravel().tolist()}
    for _ in range(600):
        answer = httpx.post(f"{url}/v2/models/digits/infer", json={"inputs": [tensor]}, timeout=60).json()
        if answer.get("parameters", {}).get("placement") == by:
            break
        time.sleep(0.1)
    assert answer["parameters"]["placement"] == by, answer.get("error") or answer["parameters"]
    scores = np.reshape(answer["outputs"][0]["data"], (HELD_OUT, 10))
    return float((scores.argmax(1) == labels).mean())
