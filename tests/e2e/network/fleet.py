"""A fleet over machines of their own: a cloud, its mosquitto, two regions, six devices and an operator.

Processes are killed one by one, without their children: to end those is the product's own work.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from pathlib import Path

import psutil

from benchmarks.network.machines import Machines
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from edge_agent.link.enroll import EnrolmentRequest
from edge_agent.link.enroll import enroll as enroll_device
from edgefl.local_fleet import LoggedProcess
from edgefl.operator.client import CloudClient, insist, load_credentials
from tests.e2e.tasks.audited.audited_task import DEVICES

REGIONS = ("r1", "r2")
AGENTS = tuple(f"d{number}" for number in range(DEVICES))
PARENTS = {"d0": ["r1", "r2", "cloud"], "d1": ["r1", "r2", "cloud"], "d2": ["r2", "r1", "cloud"],
           "d3": ["r2", "cloud"], "d4": ["cloud", "r1"], "d5": ["cloud"]}  # fmt: skip
NAMES = ("cloud", "broker", *REGIONS, *AGENTS, "operator")
TASK = Path(__file__).parents[1] / "tasks" / "audited"
DELAY_S = 0.002  # of each cable, one way
EDGEFL = (sys.executable, "-P", "-m", "edgefl")
GRPC, HTTP, MQTT = "9440", "9480", "8883"
END_S = 30.0  # by then the children of a killed process have ended


class NetworkFleet:
    """The processes of the fleet by the names of their machines; a context manager that leaves none behind."""

    def __init__(self, folder: Path, seed: int, fit_s: float) -> None:
        self.folder, self.home = folder, folder / "cloud"
        self._fit_s = fit_s
        self.machines = Machines(NAMES, seed)
        self.running: dict[str, LoggedProcess] = {}
        self._killed: list[tuple[float, str, LoggedProcess, list[psutil.Process]]] = []
        self._exit = contextlib.ExitStack()

    def __enter__(self):
        self._exit.enter_context(self.machines)
        for name in NAMES:
            self.machines.set_link(name, delay_s=DELAY_S)
        return self

    def __exit__(self, *_details):
        for process in [*self.running.values(), *(one for _, _, one, _ in self._killed)]:
            process.kill()
        self._exit.close()

    def address(self, name):
        return self.machines[name].address

    def url(self, name="cloud"):
        return f"https://{self.address(name)}:{HTTP}"

    def start(self):
        """Start everything for the first time, and wait until each device has the parents of `PARENTS`."""
        written = self._edgefl("broker", "broker-config", "cloud", "broker-config", "--home", self.home, "--port", MQTT,
                               "--host", self.address("broker"))  # fmt: skip
        written.popen.wait(60)
        self.running.pop("broker-config").stop()
        with (self.home / "mosquitto" / "mosquitto.conf").open("a", encoding="utf-8") as config:
            config.write("user root\n")  # else it becomes the user mosquitto, who cannot read our folder
        self.begin("broker")
        self.begin("cloud").wait_for("cloud.ready")
        engine = open_database(self.home / "cloud.db")
        tokens = Enrolment(engine, self.home / "tls")
        for name in REGIONS:
            self.begin(name, "--parent", self.url(), "--token", tokens.new_token(role="region"), "--name", name)
        for name in AGENTS:
            with self.machines["operator"].inside():
                enroll_device(
                    self.folder / name, EnrolmentRequest(cloud=self.url(), token=tokens.new_token(), name=name)
                )
        engine.dispose()
        for name in REGIONS:
            self.running[name].wait_for("uplink.up")
        for name, parents in PARENTS.items():
            self.assign(name, parents)
        for name in AGENTS:
            self.begin(name)
        for name in AGENTS:
            self.running[name].wait_for("mqtt.up")

    def begin(self, name, *more):
        """Start the process of a machine, again on its home; does not wait until it serves."""
        where = ("--home", self.folder / name)
        ports = ("--host", self.address(name), "--grpc-port", GRPC, "--http-port", HTTP)
        if name == "broker":
            program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
            command = [program, "-c", self.home / "mosquitto" / "mosquitto.conf"]
            self.running[name] = LoggedProcess(self.machines[name].command(command), self.folder / "broker.log")
        elif name == "cloud":
            broker = f"mqtts://{self.address('broker')}:{MQTT}"
            self._edgefl(name, name, "cloud", "start", *where, *ports, "--broker", broker, "--broker-pid-file",
                         self.home / "mosquitto" / "mosquitto.pid")  # fmt: skip
        elif name in REGIONS:
            self._edgefl(name, name, "region", "start", *where, *ports, "--mqtt-port", MQTT, *more)
        else:
            data = ("--data", f"device={AGENTS.index(name)}", "--data", f"seconds={self._fit_s}")
            self._edgefl(name, name, "agent", "start", *where, "--serve-port", "0", "--parent-lease-s", "2", *data)
        return self.running[name]

    def kill(self, name):
        """Kill the process of a machine and start it again at once; its children are left to themselves."""
        self._kill_alone(name)
        self.begin(name)

    def kill_trainer(self, name):
        """Kill the process that trains on a device; return whether there was one."""
        for one in self.machines[name].processes():
            with contextlib.suppress(psutil.Error):  # it has ended by itself
                if "edge_agent.training.trainer_main" in one.cmdline():
                    one.kill()
                    return True
        return False

    def assign(self, name, parents):
        """Give a device other parents, as an operator does."""
        credentials = load_credentials(self.home / "operator.json")
        with self.machines["operator"].inside(), CloudClient(None, credentials) as one:
            insist(lambda: one.assign_devices(name, parents))

    def start_run(self, rounds):
        """Start a job of so many rounds that count only with every device in them."""
        self.result, self.model = self.folder / "result.json", self.folder / "model.safetensors"
        for old in (self.result, self.model):
            old.unlink(missing_ok=True)
        settings = (f"rounds.clients={DEVICES}", f"rounds.quorum={DEVICES}", "rounds.deadline_s=600",
                    "rounds.offline_grace_s=600", "rounds.wait_s=600")  # fmt: skip
        options = [part for setting in settings for part in ("--set", setting)]
        return self._edgefl(
            "operator", "run", "run", TASK, "--rounds", rounds, *options, "--json", self.result, "--out", self.model
        )

    def rounds_done(self):
        """Return how many rounds the cloud has finished since its first start."""
        return (self.folder / "cloud.log").read_text(encoding="utf-8").count(" round.done ")

    def ended_by_itself(self):
        """Return what ended although nobody killed it, with the end of its log."""
        return {
            name: f"exit status {one.popen.returncode}: {one.log.read_text()[-2000:]}"
            for name, one in self.running.items() if name != "run" and one.popen.poll() is not None
        }  # fmt: skip

    def orphans(self, after_s=END_S):
        """Return what children of killed processes still run, so long after."""
        found, waiting = [], []
        for at_s, name, process, children in self._killed:
            left = [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
            if left and time.monotonic() - at_s > after_s:
                found += [f"{name}: {one}" for one in left]
            if left:
                waiting.append((at_s, name, process, children))
            else:
                process.kill()  # it has ended; this closes its pipe
        self._killed = waiting
        return found

    def end_all(self):
        """Kill every process, each alone; return what is still there of their children after a while."""
        for name in list(self.running):
            self._kill_alone(name)
        self.running.clear()
        end_s = time.monotonic() + END_S
        while (left := self.machines.processes()) and time.monotonic() < end_s:
            time.sleep(0.1)
        return left

    def _edgefl(self, machine, name, *command):
        env = {"EDGEFL_CREDENTIALS": str(self.home / "operator.json")}
        inside = self.machines[machine].command([*EDGEFL, *map(str, command)])
        self.running[name] = LoggedProcess(inside, self.folder / f"{name}.log", env)
        return self.running[name]

    def _kill_alone(self, name):
        process = self.running[name]
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        process.popen.kill()
        process.popen.wait(10)
        self._killed.append((time.monotonic(), name, process, children))
