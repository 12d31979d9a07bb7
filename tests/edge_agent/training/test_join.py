"""A site of two machines: two network namespaces, each with its processes, and torch's rendezvous between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_agent.training.join import join
from edgefl.errors import ConfigError

ROOT = Path(__file__).parents[3]
AGENT = """
import asyncio, sys
from pathlib import Path
from edge_agent.training.trainer import Trainer
from dataclasses import replace
from tests.edge_agent.training.test_site import Bench

async def main():
    bench, trainer = Bench(Path(sys.argv[1])), Trainer()
    running = asyncio.create_task(trainer.run())
    try:
        for number in (1, 2):
            request = replace(bench.fit(number, processes=1), rendezvous=sys.argv[2], machines=2)
            done = await trainer.run_request(request)
            assert bench.is_as_alone(number), number
            print("round", number, int(done.weight), flush=True)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

asyncio.run(asyncio.wait_for(main(), 240))
"""


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode == 0


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.0.0.1 and 10.0.0.2."""
    names = tuple(f"edgefl-{end}-{os.getpid()}" for end in "ab")
    if os.geteuid() != 0 or shutil.which("ip") is None or not _ip("netns", "add", names[0]):
        pytest.skip("network namespaces need root, and iproute2")
    try:
        assert _ip("netns", "add", names[1])
        assert _ip("-n", names[0], "link", "add", "site0", "type", "veth", "peer", "name", "site0", "netns", names[1])
        for number, name in enumerate(names, 1):
            assert _ip("-n", name, "address", "add", f"10.0.0.{number}/24", "dev", "site0")
            assert _ip("-n", name, "link", "set", "site0", "up")
            assert _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            _ip("netns", "del", name)


def test_two_machines_train_as_one_process_does(machines, tmp_path):
    rendezvous = "10.0.0.1:29400"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "edgefl", "agent", "join", "--site-rendezvous", rendezvous]
    script = tmp_path / "agent.py"
    script.write_text(AGENT)
    inside = [["ip", "netns", "exec", name] for name in machines]
    with (tmp_path / "join.log").open("wb") as log:
        member = subprocess.Popen([*inside[1], *command], env=environment, stderr=log)
    try:
        agent = subprocess.run(
            [*inside[0], sys.executable, str(script), str(tmp_path), rendezvous], env=environment, check=False,
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert agent.stdout.split() == ["round", "1", "64", "round", "2", "64"], agent.stderr[-3000:]
        said = (tmp_path / "join.log").read_text()
        assert "site.joining" in said
        assert member.poll() is None  # it waits for the agent's next training
    finally:
        member.send_signal(signal.SIGTERM)
        member.wait(30)
    assert member.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--site-rendezvous", "nowhere"], "is not HOST:PORT"),
        (["--site-rendezvous", "10.0.0.1:29400", "--site-machines", "1"], "--site-machines 1 must be 2 or more"),
        (["--site-rendezvous", "10.0.0.1:29400", "--processes", "0"], "--processes '0' must be a number above 0"),
        (["--site-rendezvous", "10.0.0.1:29400", "--data", "x"], "--data 'x' is not of the form"),
    ],
)
def test_what_cannot_be_joined_is_refused(arguments, said):
    result = CliRunner().invoke(join, arguments)
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


FLEET = """
import json, sys
from pathlib import Path
from edgefl.local_fleet import LocalFleet

folder, digits, options = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
with LocalFleet(folder / "fleet") as fleet:
    fleet.start()
    fleet.enroll("site")
    fleet.start_agent("site", "--data", "part=0", "--data", "parts=1", *options).wait_for("mqtt.up")
    fleet.command(
        "run", digits, "--config", digits / "config.toml", "--rounds", 2, "--set", "train.epochs=1", "--set",
        "rounds.quorum=1", "--json", folder / "run.json", timeout_s=240,
    )
"""


def documented(command: str) -> list[str]:
    """Return the options of a command on the page about sites, without the agent's home."""
    page = (ROOT / "docs" / "sites.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith(f"edgefl {command} ") and "--site" in line)
    words = line.split()[3:]
    return words[2:] if words[0] == "--home" else words


@pytest.mark.soak
def test_a_site_of_two_machines_is_a_device_of_a_fleet_by_the_commands_of_the_page(machines, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    inside = [["ip", "netns", "exec", name] for name in machines]
    script = tmp_path / "fleet.py"
    script.write_text(FLEET)
    joined = [sys.executable, "-m", "edgefl", "agent", "join", *documented("agent join")]
    with (tmp_path / "join.log").open("wb") as log:
        member = subprocess.Popen([*inside[1], *joined], env=environment, stderr=log)
    try:
        fleet = subprocess.run(
            [*inside[0], sys.executable, script, tmp_path, ROOT / "examples" / "digits", *documented("agent start")],
            env=environment, check=False, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
    finally:
        member.send_signal(signal.SIGTERM)
        member.wait(30)
    assert fleet.returncode == 0, f"{fleet.stdout[-2000:]}{fleet.stderr[-2000:]}"
    found = json.loads((tmp_path / "run.json").read_text())
    assert [one["admitted"] for one in found["rounds"]] == [1, 1]
    assert found["final"]["accuracy"] > 0.5
    assert "site.joining" in (tmp_path / "join.log").read_text()
