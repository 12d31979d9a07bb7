"""The six commands of the first page, from an empty folder to a prediction, as they stand there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.docs.pages import DOCS, blocks

FIRST, LAST = "edgefl new first", "curl "


def six_commands() -> list[str]:
    (block,) = [one for one in blocks({"index.md": (DOCS / "index.md").read_text("utf-8")}, "sh") if FIRST in one.text]
    return block.text.splitlines()


@pytest.mark.timeout(900)
def test_six_commands_go_from_an_empty_folder_to_a_prediction(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    env["HOME"] = str(tmp_path)
    env.pop("EDGEFL_CREDENTIALS", None)

    def run(line: str) -> str:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)  # noqa: S602 - our page
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    commands = six_commands()
    assert len(commands) == 6
    assert commands[0] == FIRST
    try:
        *before, predict = commands
        for line in before:
            said = run(line)
        assert "done: 3 of 3 devices active" in said
        status = json.loads(run("edgefl local status --json -"))
        serving = status["devices"]["local-0"].removeprefix("http://127.0.0.1:")
        answer = json.loads(run(predict.replace("localhost:8000", f"localhost:{serving}")))
        (output,) = answer["outputs"]
        assert output["shape"] == [1, 1]
        assert 0.5 < output["data"][0] < 2  # the target of this row is 1 + |0|
    finally:
        run("edgefl local stop")
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or [])]
