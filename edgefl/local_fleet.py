"""A whole fleet on this machine, with real processes over TLS: for the demo, tests and benchmarks.

Each process leads its own process group and always ends with the fleet: by SIGTERM first, then by SIGKILL; if this
process itself is killed, by `edgefl.process.guardian`. Its output goes to a log file; `wait_for` waits for a line
without polling.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from edgefl.errors import HostError, ProcessFailed
from edgefl.process.guardian import gated, guardian, open_gate

STOP_S = 10.0
START_S = 180.0  # also on a slow and busy machine
_PORTS = range(12_000, 32_000)  # below those that Linux, macOS and Windows give to outgoing connections
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


class LoggedProcess:
    """A child process whose output goes to a file; callers can wait for a line of it."""

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.popen = subprocess.Popen(
            gated(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
            env={**os.environ, **QUIET, **(env or {})},
            text=True,
            errors="replace",
            start_new_session=True,
        )
        open_gate(self.popen, group=True)
        self._reader = threading.Thread(target=self._read, name=f"log {log.name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_for(self, text: str, timeout_s: float = START_S, *, after: int = 0) -> int:
        """Wait for a line with `text` from line `after` on; return the number of the next line.

        Raises ProcessFailed, with the last lines, if the process ends or the time is over before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._find(text, after) is not None or self._ended, timeout_s)
            found = self._find(text, after)
            if found is not None:
                return found + 1
            seen = "it ended" if self._ended else f"not within {timeout_s:g} s"
            last = "\n  ".join(self._lines[-15:])
        raise ProcessFailed(f"{self.log.stem} did not say {text!r} ({seen}); its log {self.log} ends with:\n  {last}")

    def num_lines(self) -> int:
        with self._changed:
            return len(self._lines)

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """End the process and its children at once (SIGKILL)."""
        self.signal(signal.SIGKILL)
        self._wait()

    def stop(self) -> int:
        """Send SIGTERM, then SIGKILL if it does not end; return its exit status."""
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.popen.send_signal(signal.SIGTERM)
        try:
            self.popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
        self._wait()
        return self.popen.returncode

    def _wait(self) -> None:
        self.popen.wait(STOP_S)
        self.signal(signal.SIGKILL)  # children that outlived their leader
        guardian.release(self.pid)
        self._reader.join(STOP_S)
        if self.popen.stdout is not None:
            self.popen.stdout.close()

    def _find(self, text: str, after: int) -> int | None:
        return next((i for i in range(after, len(self._lines)) if text in self._lines[i]), None)

    def _read(self) -> None:
        stream = self.popen.stdout
        with self.log.open("a", encoding="utf-8") as log:
            for line in stream or ():
                log.write(line)
                log.flush()
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class LocalFleet:
    """A cloud, a broker and agents under one folder. A context manager that leaves no process behind.

    `broker`: embedded or builtin (the cloud's own), or mosquitto (an operator's, beside the cloud).
    """

    def __init__(self, folder: Path, *, broker: str = "embedded", insecure: bool = False) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self.home = folder / "cloud"
        self.credentials = self.home / "operator.json"
        self._broker_kind = broker
        self._region_broker = ("--broker", "builtin" if broker == "builtin" else "embedded")
        self._insecure = ("--insecure",) if insecure else ()
        self.use_ports(free_ports(3))
        self.cloud: LoggedProcess | None = None
        self.broker: LoggedProcess | None = None
        self.agents: dict[str, LoggedProcess] = {}
        self.regions: dict[str, LoggedProcess] = {}
        self.region_ports: dict[str, list[int]] = {}  # gRPC, HTTPS, MQTT

    @property
    def ports(self) -> list[int]:
        """The cloud's ports: gRPC, HTTPS, MQTT."""
        return [self.grpc_port, self.http_port, self.mqtt_port]

    def use_ports(self, ports: Sequence[int]) -> None:
        """Set the cloud's ports, as in `ports`, before it starts."""
        self.grpc_port, self.http_port, self.mqtt_port = ports
        self.url = f"{'http' if self._insecure else 'https'}://127.0.0.1:{self.http_port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        everything = [
            *self.agents.values(),
            *self.regions.values(),
            *([self.cloud] if self.cloud else []),
            *([self.broker] if self.broker else []),
        ]
        for process in everything:
            if process.popen.poll() is None:
                process.popen.terminate()  # all at once, so that they end in parallel
        for process in everything:
            process.stop()

    def start(self) -> None:
        """Start the broker, unless it is the cloud's own, and the cloud."""
        if self._broker_kind == "mosquitto":
            self.command("cloud", "broker-config", "--home", self.home, "--port", self.mqtt_port)
            if os.geteuid() == 0:  # it would switch to the user mosquitto, which cannot read our folder
                with (self.home / "mosquitto" / "mosquitto.conf").open("a", encoding="utf-8") as config:
                    config.write("user root\n")
            self.start_broker()
        self.start_cloud()

    def start_broker(self) -> None:
        """Start mosquitto with the configuration that the cloud wrote; raises HostError if it is not installed."""
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if program is None:
            raise HostError("mosquitto is not installed; on Debian: apt-get install mosquitto")
        command = [program, "-c", str(self.home / "mosquitto" / "mosquitto.conf")]
        self.broker = LoggedProcess(command, self.folder / "broker.log")
        self.broker.wait_for("running")

    def start_cloud(self, *options: str, env: Mapping[str, str] | None = None) -> None:
        """Start the cloud, with the same home and ports as before, and wait until it serves."""
        mosquitto = ("--broker", f"mqtts://127.0.0.1:{self.mqtt_port}")
        own = ("--broker", self._broker_kind, "--mqtt-port", str(self.mqtt_port))
        self.cloud = self.spawn(
            "cloud.log", "cloud", "start", "--home", self.home, "--grpc-port", self.grpc_port,
            "--http-port", self.http_port, *(mosquitto if self._broker_kind == "mosquitto" else own),
            *self._insecure, *options, env=env,
        )  # fmt: skip
        self.cloud.wait_for("cloud.ready")

    def token(self) -> str:
        """Return a new one-time enrolment token."""
        return self.command("cloud", "token", "--home", self.home).strip()

    def url_of(self, region: str) -> str:
        """Return where a region serves; empty = the cloud."""
        return f"https://127.0.0.1:{self.region_ports[region][1]}" if region else self.url

    def start_region(self, name: str, *options: str, parent: str = "") -> None:
        """Start a region below another one, or below the cloud, and wait until it serves and is connected.

        It has the same home and ports as before if it was started before.
        """
        enrol: tuple[str | Path, ...] = ()
        self.region_ports.setdefault(name, free_ports(3))
        if not (self.folder / name / "region.json").exists():
            token = self.command("cloud", "token", "--home", self.home, "--role", "region").strip()
            enrol = ("--parent", self.url_of(parent), "--token", token, "--name", name)
        grpc_port, http_port, mqtt_port = self.region_ports[name]
        self.regions[name] = self.spawn(
            f"{name}.log", "region", "start", "--home", self.folder / name, "--grpc-port", grpc_port,
            "--http-port", http_port, "--mqtt-port", mqtt_port, *self._region_broker, *enrol, *options,
        )  # fmt: skip
        self.regions[name].wait_for("uplink.up")

    def enroll(self, name: str, *options: str, region: str = "") -> Path:
        """Enrol a device with the cloud, or with a region; return its home."""
        home = self.folder / name
        self.command(
            "agent", "enroll", "--home", home, "--cloud", self.url_of(region), "--token", self.token(),
            "--name", name, *options,
        )  # fmt: skip
        return home

    def start_agent(self, name: str, *options: str, env: Mapping[str, str] | None = None) -> LoggedProcess:
        """Start an enrolled agent, which chooses a free serving port; does not wait for it."""
        home = self.folder / name
        self.agents[name] = self.spawn(
            f"{name}.log", "agent", "start", "--home", home, "--serve-port", "0", *options, env=env
        )
        return self.agents[name]

    def wait_online(self, name: str) -> None:
        """Wait until an agent is connected, and the cloud that was started last knows it, also through a region."""
        self.agents[name].wait_for("mqtt.up")
        if self.cloud is not None:
            self.cloud.wait_for(f"device.online device={name} ")

    def spawn(self, log: str, *command: str | Path | int, env: Mapping[str, str] | None = None) -> LoggedProcess:
        """Start an edgefl command as this fleet's operator."""
        env = {"EDGEFL_CREDENTIALS": str(self.credentials), **(env or {})}
        return LoggedProcess([*_EDGEFL, *(str(part) for part in command)], self.folder / log, env)

    def command(self, *command: str | Path | int, timeout_s: float = START_S) -> str:
        """Run an edgefl command as this fleet's operator; return its output. Raises ProcessFailed if it fails."""
        with subprocess.Popen(
            gated([*_EDGEFL, *(str(part) for part in command)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUIET, "EDGEFL_CREDENTIALS": str(self.credentials)},
        ) as process:
            open_gate(process)
            try:
                said, complaint = process.communicate(timeout=timeout_s)
            finally:
                process.kill()  # if it is late, or we are interrupted
                process.wait()
                guardian.release(process.pid)
        if process.returncode:
            raise ProcessFailed(f"edgefl {command[0]} {command[1]} failed: {complaint.strip()}")
        return said


_EDGEFL = (sys.executable, "-P", "-m", "edgefl")  # -P: never import a folder `cloud` of the working directory


def free_ports(count: int) -> list[int]:
    """Return TCP ports of the loopback interface that are free now, and that no outgoing connection is given."""
    chance, found = random.SystemRandom(), list[int]()
    with contextlib.ExitStack() as held:
        while len(found) < count:
            port = chance.choice(_PORTS)
            with contextlib.suppress(OSError):  # in use
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found
