"""Three processes that have trained every case of `tasks`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SIZE, LIMIT_S = 3, 240


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the leader returned for each case, and why it refused some."""
    folder = tmp_path_factory.mktemp("together")
    root = Path(__file__).parents[4]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.edgefl.training.parallel.tasks", str(rank), str(SIZE), str(folder)], cwd=root
        )
        for rank in range(SIZE)
    ]
    try:
        assert [one.wait(LIMIT_S) for one in processes] == [0] * SIZE
    finally:
        for one in processes:
            one.kill()
            one.wait()
    return folder
