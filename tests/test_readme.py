"""The README's three uses, as it says, each in an environment of its own: cloud, devices, operator."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path

import pytest

from edgefl.local_fleet import LoggedProcess, free_ports
from tests.environments import LOCK, ROOT, Environment

pytestmark = [pytest.mark.soak]

README = (ROOT / "README.md").read_text(encoding="utf-8")


def extras_in(section: str) -> str:
    """Return what the first install command of a section asks for."""
    found = re.search(r"pip install '\.\[([a-z,]+)\]'", README.partition(f"### {section}\n")[2])
    assert found is not None
    return found[1]


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, Environment]:
    made = {}
    for name, section in {
        "cloud": "Start the cloud",
        "device": "Install a device",
        "operator": "Train, publish, predict",
    }.items():
        made[name] = Environment(tmp_path / f"venv-{name}")
        made[name].install(*LOCK, f"{ROOT}[{extras_in(section)}]")
    return made


def test_the_readme_makes_a_fleet_that_trains_publishes_and_predicts(
    installed: dict[str, Environment], tmp_path: Path
) -> None:
    home, digits = tmp_path / "cloud", ROOT / "examples" / "digits"
    grpc, http, mqtt = free_ports(3)
    url = f"https://127.0.0.1:{http}"

    def command(who: str, *words: str | Path) -> str:
        done = installed[who].edgefl(*map(str, words), cwd=tmp_path, env={"EDGEFL_CREDENTIALS": home / "operator.json"})
        assert done.returncode == 0, f"edgefl {' '.join(map(str, words))}: {done.stdout}{done.stderr}"
        return done.stdout

    processes: list[LoggedProcess] = []

    def start(who: str, log: str, *words: str | Path) -> LoggedProcess:
        processes.append(LoggedProcess([installed[who].folder / "bin" / "edgefl", *words], tmp_path / log))
        return processes[-1]

    try:
        ports = ("--grpc-port", str(grpc), "--http-port", str(http), "--mqtt-port", str(mqtt))
        start("cloud", "cloud.log", "cloud", "start", "--home", home, *ports).wait_for("cloud.ready")
        for part in ("0", "1"):
            device, token = tmp_path / f"device-{part}", command("cloud", "cloud", "token", "--home", home).strip()
            command(
                "device", "agent", "enroll", "--home", device, "--cloud", url, "--token", token, "--name", f"d{part}"
            )
            start(
                "device", f"device-{part}.log", "agent", "start", "--home", device, "--serve-port", "0",
                "--data", f"part={part}", "--data", "parts=2",
            ).wait_for("mqtt.up")  # fmt: skip
        result = tmp_path / "run.json"
        config = digits / "config.toml"
        command("operator", "run", digits, "--cloud", url, "--config", config, "--rounds", "2", "--json", result)
        rounds = json.loads(result.read_text(encoding="utf-8"))["rounds"]
        assert [one["admitted"] for one in rounds] == [2, 2], rounds
        job = re.search(r"job-[0-9a-f]+", command("operator", "jobs", "list", "--cloud", url))
        assert job is not None
        command("operator", "models", "publish", "digits", "--task", digits, "--job", job[0], "--cloud", url)
        command("operator", "rollout", "start", "digits", "--wait", "60", "--cloud", url)
        serving = (tmp_path / "device-0" / "serving").read_text(encoding="ascii")
        with urllib.request.urlopen(f"{serving}/v2/models/digits", timeout=10) as answer:  # noqa: S310 - loopback
            assert json.load(answer)["versions"] == ["1"]
    finally:
        for process in processes:
            process.stop()


def test_the_hint_of_a_missing_extra_can_be_run_as_it_stands(tmp_path: Path) -> None:
    bare = Environment(tmp_path / "venv")
    bare.install(*LOCK, "pip", ROOT)
    said = bare.edgefl("simulate", str(ROOT / "examples" / "flower-app"), cwd=tmp_path).stderr
    hint = said.partition("extra: ")[2].strip()
    assert hint.startswith(f"{bare.python.parent}")
    subprocess.run(f"{hint} --dry-run --quiet", shell=True, check=True, timeout=600)  # noqa: S602 - our own hint
