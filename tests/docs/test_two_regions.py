"""The first commands of the page on regions, as they stand there: a cloud, two regions and six devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, blocks

FIRST = "edgefl local start --devices 6 --regions 2"


@pytest.mark.soak
def test_six_devices_below_two_regions_learn_the_digits(tmp_path: Path) -> None:
    page = {"hierarchy.md": (DOCS / "hierarchy.md").read_text("utf-8")}
    (block,) = [one for one in blocks(page, "sh") if one.text.startswith(FIRST)]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    env.pop("EDGEFL_CREDENTIALS", None)
    try:
        for line in block.text.splitlines():
            done = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)  # noqa: S602 - our page
            assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
            if "devices tree" in line:
                assert "cloud  6 of 6 devices online" in done.stdout
                assert done.stdout.count("3 of 3 devices online") == 2
    finally:
        subprocess.run("edgefl local stop", shell=True, cwd=tmp_path, env=env, capture_output=True, check=False)  # noqa: S602
    result = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert result["final"]["accuracy"] >= 0.93
    assert {one["admitted"] for one in result["rounds"]} == {6}
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")
