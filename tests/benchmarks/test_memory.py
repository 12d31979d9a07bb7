import subprocess
import sys

import pytest

from benchmarks.memory import peak_rss_mb, tree, tree_peak_rss_mb, tree_rss_mb

HOLDS_AND_LETS_GO = "data = b'x' * 80_000_000; del data; print('ready', flush=True); input()"
HAS_A_CHILD = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'print(\"ready\", flush=True); input()'],"
    "stdin=subprocess.PIPE); input(); child.communicate(b'\\n')"
)


@pytest.fixture
def start():
    started = []

    def _start(code: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield _start
    for process in started:
        process.communicate(b"\n", timeout=10)


def test_the_kernel_remembers_a_peak_that_is_over(start) -> None:
    pid = start(HOLDS_AND_LETS_GO).pid
    assert peak_rss_mb(pid) > 85
    assert tree_rss_mb(pid) < peak_rss_mb(pid) - 70


def test_a_tree_has_its_children(start) -> None:
    pid = start(HAS_A_CHILD).pid
    assert len(tree(pid)) == 2
    assert tree_rss_mb(pid) > 1.5 * peak_rss_mb(pid)
    assert tree_peak_rss_mb(pid) >= tree_rss_mb(pid) * 0.95


def test_a_process_that_is_gone_has_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(10)
    assert (tree(process.pid), tree_rss_mb(process.pid)) == ([], 0)
