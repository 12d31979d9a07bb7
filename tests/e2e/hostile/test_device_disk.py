"""A device whose disk is full: it says so at once, starts, links and serves, and is back when there is space."""

import json
import os
import subprocess

import onnx
import pytest

from edgefl.local_fleet import LocalFleet
from tests import onnx_models


@pytest.fixture
def small_disk(tmp_path):
    """Give a device's home a disk of its own, of 12 MB; agents on it must have ended before the test does."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    mounted = []

    def mount(home):
        aside = home.with_name(f"{home.name}-aside")
        home.rename(aside)
        home.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", home], check=True)
        mounted.append(home)
        subprocess.run(["cp", "-a", f"{aside}/.", home], check=True)

    yield mount
    for home in mounted:
        subprocess.run(["umount", "-l", home], check=True)


def fill(home):
    """Leave not a byte; returns the file to remove."""
    filler = home / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return filler


def test_a_release_larger_than_the_disk_is_refused_and_the_agent_lives(
    embedded_fleet: LocalFleet, three, round_is_right, small_disk, tmp_path
) -> None:
    data = three(embedded_fleet)
    embedded_fleet.agents["c"].stop()
    small_disk(embedded_fleet.folder / "c")
    model = tmp_path / "large.onnx"
    proto = onnx.load_from_string(onnx_models.affine())
    proto.doc_string = "x" * 30_000_000
    onnx.save(proto, model)
    try:
        agent = embedded_fleet.restart_agent("c", **data["c"])
        embedded_fleet.command("models", "publish", "large", "--onnx", model, "--cloud", embedded_fleet.url)
        embedded_fleet.command("rollout", "start", "large", "--to", "name:c", "--cloud", embedded_fleet.url)
        agent.wait_for("release.failed")
        status = ("rollout", "status", "--cloud", embedded_fleet.url, "--json", "-")
        rollout = json.loads(embedded_fleet.command(*status))[0]["id"]
        assert "of disk space" in embedded_fleet.command(*status, rollout)
        agent.kill()
        embedded_fleet.restart_agent("c", **data["c"])
        assert not list((embedded_fleet.folder / "c" / "models").rglob("*.part"))
        round_is_right(embedded_fleet)
    finally:
        embedded_fleet.agents["c"].stop()


def test_a_full_disk_is_told_and_keeps_nobody_out(
    embedded_fleet: LocalFleet, three, round_is_right, small_disk
) -> None:
    data = three(embedded_fleet)
    embedded_fleet.agents["c"].stop()
    small_disk(embedded_fleet.folder / "c")
    try:
        embedded_fleet.restart_agent("c", **data["c"])
        filler = fill(embedded_fleet.folder / "c")
        settings = ("rounds.clients=3", "rounds.quorum=2", "rounds.deadline_s=60")
        result, _ = embedded_fleet.run_task("numbers", *settings)
        assert result["rounds"][0]["admitted"] == 2
        assert "space" in result["rounds"][0]["reasons"]["c"]
        assert result["rounds"][0]["seconds"] < 30

        embedded_fleet.agents["c"].kill()
        embedded_fleet.restart_agent("c", **data["c"])  # links with not a byte of disk left
        result, _ = embedded_fleet.run_task("numbers", *settings)
        assert "space" in result["rounds"][0]["reasons"]["c"]

        filler.unlink()
        round_is_right(embedded_fleet)
    finally:
        embedded_fleet.agents["c"].stop()
