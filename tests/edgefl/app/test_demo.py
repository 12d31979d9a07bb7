import json
import signal
import subprocess
import sys

import psutil
import pytest

from edgefl.app.demo import find_example
from edgefl.errors import ConfigError

CONTRACT = {"rounds", "final", "seconds", "clients_per_second", "engine", "peak_rss_mb", "model"}


def environment(folder):
    return {"TMPDIR": str(folder), "PATH": "/usr/sbin:/usr/bin"}


def processes_of(folder):
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(one.info["cmdline"] or [])]


@pytest.mark.parametrize(
    "broker",
    ["embedded", pytest.param("builtin", marks=pytest.mark.soak), pytest.param("mosquitto", marks=pytest.mark.soak)],
)
def test_the_whole_loop(tmp_path, broker):
    command = [sys.executable, "-m", "edgefl", "demo", "--broker", broker, "--json", str(tmp_path / "demo.json")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result.keys() >= CONTRACT
    assert result["final"]["accuracy"] >= 0.93
    assert {round_["admitted"] for round_ in result["rounds"]} == {3}
    answers = [one["predicted"] for one in result["predictions"]]
    assert len(answers) == 3
    assert answers[0] == answers[1] == answers[2]
    assert list(tmp_path.glob("edgefl*")) == []
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_it_cleans_up_when_it_is_interrupted(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "edgefl", "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(tmp_path),
    )  # fmt: skip
    lines = iter(process.stdout)
    assert any("round 2/" in line for line in lines)
    assert processes_of(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert list(tmp_path.glob("edgefl*")) == []
    assert processes_of(tmp_path) == []


def test_an_example_is_found_or_named():
    assert (find_example("digits") / "pyproject.toml").exists()
    with pytest.raises(ConfigError, match="'nothing'"):
        find_example("nothing")
