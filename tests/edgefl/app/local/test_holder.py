"""A local fleet: it stays, is found again, and leaves nothing when it ends, however it ends."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from edgefl.app.local.holder import _take_regions
from edgefl.errors import ConfigError
from edgefl.local_fleet import LocalFleet
from edgefl.process.home import home_holder


@pytest.fixture
def edgefl(tmp_path):
    """Run `edgefl local` in a home of its own; end the fleet at the end."""
    env = {name: value for name, value in os.environ.items() if name != "EDGEFL_CREDENTIALS"}
    env |= {"XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}

    def run(*words, status=0):
        command = [sys.executable, "-P", "-m", "edgefl", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=env)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stderr if status == 1 else done.stdout

    run.home = tmp_path / "edgefl" / "local"
    yield run
    run("local", "stop")
    assert processes_in(tmp_path) == []


def processes_in(folder):
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or [])]


def test_a_local_fleet_stays_and_is_used_by_other_commands(edgefl):
    edgefl("local", "start", "--devices", "2")
    status = json.loads(edgefl("local", "status", "--json", "-"))
    assert list(status["devices"]) == ["local-0", "local-1"]
    assert "running already, asked for: 3" in edgefl("local", "start", "--devices", "3", status=1)
    again = json.loads(edgefl("local", "start", "--devices", "2", "--json", "-"))
    assert again == status
    assert [one["name"] for one in json.loads(edgefl("devices", "list", "--json", "-"))] == ["local-0", "local-1"]
    assert "the local fleet is stopped" in edgefl("local", "stop")
    assert "no local fleet is running" in edgefl("local", "stop")
    assert "no local fleet is running" in edgefl("local", "status", status=3)
    edgefl("local", "start", "--devices", "2")  # the same devices, enrolled before
    assert json.loads(edgefl("local", "status", "--json", "-"))["url"] == status["url"]


def test_a_killed_holder_leaves_no_process_behind(edgefl):
    edgefl("local", "start", "--devices", "1")
    holder = psutil.Process(home_holder(edgefl.home).pid)
    processes = [one for one in processes_in(edgefl.home) if one.pid != holder.pid]
    assert len(processes) >= 2
    os.kill(holder.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, 30)
    assert alive == []
    assert "no local fleet is running" in edgefl("local", "status", status=3)


def test_a_fleet_that_cannot_start_says_why(edgefl):
    edgefl.home.mkdir(parents=True)
    (edgefl.home / "cloud").write_text("a file")
    assert "cloud" in edgefl("local", "start", "--devices", "1", status=1)
    assert home_holder(edgefl.home) is None


def test_the_regions_of_a_home_are_those_of_its_first_start(tmp_path):
    first, again = LocalFleet(tmp_path / "one"), LocalFleet(tmp_path / "two")
    assert _take_regions(tmp_path, first, 2) == ["region-0", "region-1"]
    assert _take_regions(tmp_path, again, None) == ["region-0", "region-1"]
    assert again.region_ports == first.region_ports
    with pytest.raises(ConfigError, match=r"has 2 regions, asked for: 3\. Its devices are enrolled there"):
        _take_regions(tmp_path, again, 3)
