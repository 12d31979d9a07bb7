"""Real parts that many tests stand on: a fleet's CA, and either broker on a free loopback port."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from cloud.broker import EmbeddedBroker
from cloud.broker_config import write_broker_config
from edgefl.protocols import tls
from edgefl.protocols.mqtt import LinkConfig, MqttLink, Will
from edgefl.protocols.tls import Identity

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class FleetCA:
    """A fleet's CA in a folder; `cloud` is its cloud, and its brokers' server certificate."""

    folder: Path
    cloud: Identity

    def device(self, name: str) -> Identity:
        """Return a device's identity, made at the first call."""
        folder = self.folder / "devices" / name
        identity = Identity(folder / "key.pem", folder / "cert.pem", self.folder / "ca.pem")
        if not identity.cert.exists():
            folder.mkdir(parents=True, exist_ok=True)
            identity.cert.write_bytes(tls.sign_request(self.folder, tls.new_request(identity, name), name))
        return identity


def make_fleet_ca(folder: Path) -> FleetCA:
    folder.mkdir(parents=True, exist_ok=True)
    tls.create_ca(folder)
    cloud = Identity.in_folder(folder)
    tls.issue_server(folder, cloud, ["localhost", "127.0.0.1"])
    return FleetCA(folder, cloud)


class Mosquitto:
    """A mosquitto process on our configuration, with the surface of EmbeddedBroker."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.url = f"mqtts://127.0.0.1:{port}"
        self.lines: list[str] = []
        self._config = write_broker_config(folder, "127.0.0.1", port)
        if os.geteuid() == 0:  # it would become the user mosquitto, who cannot read a test's folder
            self._config.write_text(self._config.read_text() + "user root\n")
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen([MOSQUITTO, "-c", self._config], stderr=subprocess.PIPE, text=True)
        running = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr, running), name="mosquitto-log")
        self._reader.start()
        assert running.wait(10), f"mosquitto does not start: {self.lines}"

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._reader.join(10)
            self._process.stderr.close()
            self._process = None

    def _read(self, log: IO[str], running: threading.Event) -> None:
        for line in log:
            self.lines.append(line)
            if " running" in line:
                running.set()


@pytest.fixture
def fleet_ca(tmp_path: Path) -> FleetCA:
    """A fresh CA: `.cloud` and `.device(name)` are identities of one fleet."""
    return make_fleet_ca(tmp_path / "fleet-ca")


@pytest.fixture
def strange_ca(tmp_path: Path) -> FleetCA:
    """The CA of another fleet."""
    return make_fleet_ca(tmp_path / "strange-ca")


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(params=["embedded", "mosquitto"])
def broker(request: pytest.FixtureRequest, fleet_ca: FleetCA, free_port: int) -> Iterator[EmbeddedBroker | Mosquitto]:
    """Either broker, running: `.url`, `.port`, `.stop()`, `.start()` (again on the same port)."""
    one: EmbeddedBroker | Mosquitto
    if request.param == "embedded":
        one = EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", free_port)
    elif MOSQUITTO is None:
        pytest.skip("mosquitto is not installed; run deploy/system-packages.sh")
    else:
        one = Mosquitto(fleet_ca.folder, free_port)
    one.start()
    yield one
    one.stop()


class Peer:
    """An MQTT client with an inbox; connected when it is made, or `link.reason` says why not."""

    def __init__(self, config: LinkConfig, timeout_s: float = 5.0) -> None:
        self.inbox: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.connects: queue.Queue[None] = queue.Queue()
        self.link = MqttLink(
            config,
            on_message=lambda topic, payload: self.inbox.put((topic, payload)),
            on_connect=lambda: self.connects.put(None),
        )
        self.link.start()
        self.connected = self.link.wait_connected(timeout_s)

    def next(self, timeout_s: float = 5.0) -> tuple[str, bytes]:
        return self.inbox.get(timeout=timeout_s)


@pytest.fixture
def peer(broker: EmbeddedBroker | Mosquitto, fleet_ca: FleetCA) -> Iterator[Callable[..., Peer]]:
    """`peer(name, *filters)`: a connected client of `broker` that subscribes to the filters."""
    peers: list[Peer] = []

    def connect(
        name: str, *filters: str, identity: Identity | None = None, will: Will | None = None, timeout_s: float = 5.0
    ) -> Peer:
        known = fleet_ca.cloud if name == "cloud" else fleet_ca.device(name)
        subscriptions = [(one, 1) for one in filters]
        config = LinkConfig(
            url=broker.url, client_id=name, identity=identity or known, subscriptions=subscriptions, will=will
        )
        peers.append(Peer(config, timeout_s))
        return peers[-1]

    yield connect
    for one in peers:
        one.link.close(flush_s=0.2)
