"""The cloud's disk is full: a pause with a reason, that ends when there is space; nothing is lost by it."""

import contextlib
import json
import os
import subprocess
import time

import numpy as np
import pytest

from edgefl.errors import ProcessFailed

MEAN = (1 * 1.0 + 2 * 4.0 + 5 * 10.0) / 8  # of the three devices
DISK_MB = 24
ROUNDS = 150


class Disk:
    """A small file system of its own."""

    def __init__(self, folder):
        self.folder, self._fill = folder, folder / "fill"

    def fill(self):
        with self._fill.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue

    def free(self):
        self._fill.unlink()


@pytest.fixture(params=["builtin", "embedded"])
def small(request, tmp_path, fleet_class):
    """A cloud whose home is on a small disk, and that disk."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a tmpfs")
    home = tmp_path / "cloud"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", home], check=True)
    try:
        with fleet_class(tmp_path, broker=request.param) as fleet:
            fleet.start()
            yield fleet, Disk(home)
    finally:
        subprocess.run(["umount", "-l", home], check=True)


def jobs(fleet):
    shown = fleet.folder / "jobs.json"
    fleet.command("jobs", "list", "--json", shown)
    return json.loads(shown.read_text())


def until(condition, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


def test_a_full_disk_is_a_pause_of_the_job_that_runs(small, three, round_is_right):
    fleet, disk = small
    three(fleet)
    deadline_s = 3
    run = fleet.start_run("numbers", "rounds.clients=3", "rounds.quorum=3", f"rounds.deadline_s={deadline_s}",
                          rounds=ROUNDS)  # fmt: skip
    fleet.cloud.wait_for("round.done")
    disk.fill()
    full_s = time.monotonic()
    fleet.cloud.wait_for("storage.refused")
    until(lambda: (jobs(fleet)[0]["waiting"] or "").startswith("waiting for disk space"))
    job = jobs(fleet)[0]
    assert job["state"] == "running"
    assert "waiting for disk space" in fleet.command("jobs", "show", job["id"])
    until(lambda: time.monotonic() > full_s + 4 * deadline_s)  # no deadline runs meanwhile
    assert jobs(fleet)[0]["state"] == "running"
    assert run.popen.poll() is None
    disk.free()
    result, model = fleet.finish_run(run)
    fleet.cloud.wait_for("storage.back")
    said = run.log.read_text().splitlines()
    (pauses,) = (line for line in said if "pauses: the cloud is waiting for disk space" in line)
    assert f"waiting for disk space in {fleet.home}: " in pauses
    assert said.count(f"job {job['id']} continues: the cloud no longer waits") == 1
    assert [one["admitted"] for one in result["rounds"]] == [3] * ROUNDS
    assert [one["round"] for one in result["rounds"]] == list(range(1, ROUNDS + 1))
    np.testing.assert_allclose(model["w"], np.full(3, ROUNDS * MEAN), rtol=1e-4)
    assert model["n"] == ROUNDS
    assert jobs(fleet)[0]["waiting"] is None
    round_is_right(fleet)


def test_a_job_that_waits_for_space_can_be_cancelled_and_a_cloud_stopped(small, three, round_is_right):
    fleet, disk = small
    three(fleet)
    run = fleet.start_run("numbers", "rounds.clients=3", "rounds.quorum=3", rounds=100_000)
    fleet.cloud.wait_for("round.done")
    disk.fill()
    fleet.cloud.wait_for("storage.refused")
    until(lambda: jobs(fleet)[0]["waiting"])
    job = jobs(fleet)[0]["id"]
    with contextlib.suppress(ProcessFailed):  # the command fails where that cannot be written yet
        fleet.command("jobs", "cancel", job)
    disk.free()
    run.popen.wait(30)
    assert run.stop() != 0
    assert jobs(fleet)[0]["state"] == "cancelled"
    round_is_right(fleet)

    second = fleet.start_run("numbers", "rounds.clients=3", "rounds.quorum=3", rounds=100_000)
    done = fleet.cloud.wait_for("round.done", after=fleet.cloud.num_lines())
    disk.fill()
    fleet.cloud.wait_for("storage.refused", after=done)
    assert fleet.cloud.stop() == 0  # not after a kill
    disk.free()
    fleet.start_cloud()
    fleet.cloud.wait_for("round.done")
    fleet.command("jobs", "cancel", jobs(fleet)[0]["id"])
    second.popen.wait(30)
    assert second.stop() != 0
    round_is_right(fleet)


def test_an_upload_of_the_operator_to_a_full_disk_is_told_why(small, three, round_is_right):
    fleet, disk = small
    three(fleet)
    disk.fill()
    run = fleet.start_run("numbers", "rounds.clients=3", "rounds.quorum=3")
    fleet.cloud.wait_for("storage.refused")
    disk.free()
    _, model = fleet.finish_run(run)
    np.testing.assert_allclose(model["w"], np.full(3, MEAN), rtol=1e-6)
    round_is_right(fleet)
