import json
from pathlib import Path

import psutil
import pytest

from cloud.broker.child import find_mosquitto
from edgefl.local_fleet import LocalFleet
from edgefl.trees import SpooledTree

TASKS = Path(__file__).parent / "tasks"


class Fleet(LocalFleet):
    """A local fleet with the shorthands that tests use."""

    runner = None

    def __exit__(self, *details):
        if self.runner is not None:
            self.runner.stop()
        super().__exit__(*details)

    @property
    def is_builtin(self):
        return self._broker_kind == "builtin"

    def kill_broker(self):
        """Kill a broker that is a process of its own; the cloud starts its child again."""
        if self.broker is not None:
            self.broker.kill()
            return
        [child] = [one for one in psutil.Process(self.cloud.pid).children() if one.name() == "mosquitto"]
        child.kill()

    def add_agent(self, name, **data):
        self.enroll(name)
        return self.restart_agent(name, **data)

    def restart_agent(self, name, **data):
        options = [part for key, value in data.items() for part in ("--data", f"{key}={value}")]
        agent = self.start_agent(name, *options)
        agent.wait_for("mqtt.up")
        return agent

    def run_task(self, task, *settings, rounds=1, config=None, timeout_s=500):
        """Run a task to its end; return its JSON and its final parameters."""
        result, out = self.folder / "result.json", self.folder / "model.safetensors"
        options = [part for setting in settings for part in ("--set", setting)]
        options += ["--config", config] if config else []
        self.command(
            "run", TASKS / task, "--cloud", self.url, "--rounds", rounds, *options, "--json", result, "--out", out,
            timeout_s=timeout_s,
        )  # fmt: skip
        return json.loads(result.read_text()), SpooledTree(out)

    def start_run(self, task, *settings, rounds=1):
        """Start `edgefl run` as a process of its own, for tests that break something meanwhile."""
        options = [part for setting in settings for part in ("--set", setting)]
        self.result, self.out = self.folder / "result.json", self.folder / "model.safetensors"
        self.runner = self.spawn(
            "run.log", "run", TASKS / task, "--cloud", self.url, "--rounds", rounds, *options,
            "--json", self.result, "--out", self.out,
        )  # fmt: skip
        return self.runner

    def finish_run(self, process, timeout_s=500):
        process.popen.wait(timeout_s)
        assert process.stop() == 0, process.log.read_text()
        return json.loads(self.result.read_text()), SpooledTree(self.out)


@pytest.fixture
def fleet_class():
    """What `fleet` is made of, for a test that prepares its folder first."""
    return Fleet


@pytest.fixture(params=["builtin", "mosquitto"])
def fleet(request, tmp_path):
    """A running cloud with the built-in broker, with a mosquitto as its child, or ("external") with one beside it."""
    if request.param != "builtin" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed; deploy/system-packages.sh installs it")
    kind = {"builtin": "builtin", "mosquitto": "embedded", "external": "mosquitto"}[request.param]
    with Fleet(tmp_path, broker=kind) as fleet:
        fleet.start()
        yield fleet


@pytest.fixture
def embedded_fleet(tmp_path):
    """A running cloud with its own broker, whichever program that is here."""
    with Fleet(tmp_path) as fleet:
        fleet.start()
        yield fleet


@pytest.fixture
def builtin_fleet(tmp_path):
    """A running cloud with the built-in broker."""
    with Fleet(tmp_path, broker="builtin") as fleet:
        fleet.start()
        yield fleet


@pytest.fixture
def insecure_fleet(tmp_path):
    """A running cloud without TLS."""
    with Fleet(tmp_path, insecure=True) as fleet:
        fleet.start()
        yield fleet
