"""The soft limit is raised, in a process of its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
from edgefl.process.descriptors import raise_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(raise_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard"), [(100, 700), (700, 700)])
def test_the_soft_limit_becomes_the_hard_one(soft, hard):
    script = SCRIPT.format(soft=soft, hard=hard)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(hard)] * 3
