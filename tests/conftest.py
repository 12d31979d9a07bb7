"""Real parts that many tests stand on: a fleet's CA, either broker on a free loopback port, the HTTPS plane."""

from __future__ import annotations

import asyncio
import os
import queue
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from cloud.broker.mosquitto_config import CRL_FILE, write_broker_config
from cloud.dataplane.device_logs import DeviceLogs
from cloud.dataplane.live_relay import RelayTiming
from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.relays import RelayDependencies, Relays
from cloud.http.api import make_app, serve_http
from cloud.http.services import Services
from cloud.jobs.answers import AnswerRow
from cloud.jobs.choice import ChoiceBoard
from cloud.jobs.control import JobControl
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import Enrolment
from cloud.state.jobs import Jobs
from cloud.state.members import Members
from cloud.state.registry import Registry
from cloud.state.relay_rows import RelayRows
from cloud.state.rollout import Rollouts
from cloud.state.spool import Spool
from cloud.state.store import open_database
from cloud.trust.crl import make_crl
from edgefl.operator.client import write_operator_credentials
from edgefl.process.guardian import gated, guardian, open_gate
from edgefl.protocols import tls
from edgefl.protocols.manifest import new_fleet_key, public_pem, sign
from edgefl.protocols.messages import Deliver, DeviceState, LogWanted, RoundClosed, Signed, Telemetry
from edgefl.protocols.mqtt import LinkConfig, Will
from edgefl.protocols.tls import Identity
from edgefl.testing import ManualClock
from tests.outside import alive, children_of, eventually, until  # noqa: F401 - fixtures
from tests.threaded import Broker, Link

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def pytest_xdist_auto_num_workers() -> int:
    """Return two workers per core, since most of the long tests wait for the processes that they start."""
    return 2 * (os.cpu_count() or 1)


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
    """A mosquitto process on our configuration, with the surface of Broker."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.url = f"mqtts://127.0.0.1:{port}"
        self.lines: list[str] = []
        (folder / CRL_FILE).write_bytes(make_crl(folder, []))
        self._config = write_broker_config(folder, "127.0.0.1", port)
        if os.geteuid() == 0:  # it would become the user mosquitto, who cannot read a test's folder
            self._config.write_text(self._config.read_text() + "user root\n")
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            gated([MOSQUITTO, "-c", self._config]), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        open_gate(self._process)
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
            guardian.release(self._process.pid)
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


@pytest.fixture(params=["builtin", "mosquitto"])
def broker(request: pytest.FixtureRequest, fleet_ca: FleetCA, free_port: int) -> Iterator[Broker | Mosquitto]:
    """Either broker, running: `.url`, `.port`, `.stop()`, `.start()` (again on the same port)."""
    one: Broker | Mosquitto
    if request.param == "builtin":
        one = Broker(fleet_ca.cloud, "127.0.0.1", free_port)
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
        self.link = Link(
            config,
            on_failure=pytest.fail,
            on_message=lambda topic, payload: self.inbox.put((topic, payload)),
            on_connect=lambda: self.connects.put(None),
        )
        self.link.start()
        self.connected = self.link.wait_connected(timeout_s)

    def next(self, timeout_s: float = 5.0) -> tuple[str, bytes]:
        return self.inbox.get(timeout=timeout_s)


@pytest.fixture
def peer(broker: Broker | Mosquitto, fleet_ca: FleetCA) -> Iterator[Callable[..., Peer]]:
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


OPERATOR = "operator's own"


class HeardLink:
    """What the operator's plane needs of a link, in memory: states that a test sets, wishes that were sent."""

    def __init__(self) -> None:
        self.states: dict[str, DeviceState] = {}
        self.measured: dict[str, Telemetry] = {}
        self.through: dict[str, str] = {}  # device -> its region
        self.sent: list[tuple[str, Signed]] = []
        self.told: list[tuple[str, Deliver | RoundClosed]] = []
        self.reason = ""
        self.logs: DeviceLogs | None = None  # which gets the log of each device that is asked for it

    def state(self, device: str) -> DeviceState | None:
        return self.states.get(device)

    def via(self, device: str) -> str:
        return self.through.get(device, "")

    def telemetry(self, device: str) -> Telemetry | None:
        return self.measured.get(device)

    def forget(self, device: str) -> None:
        self.states.pop(device, None)

    def send_desired(self, device: str, signed: Signed) -> None:
        self.sent.append((device, signed))

    def send_job(self, device: str, message: Deliver | RoundClosed) -> None:
        self.told.append((device, message))

    def close_round(self, job: str, number: int) -> None:
        pass

    def send_command(self, device: str, command: LogWanted) -> None:
        if self.logs is not None:
            self.logs.receive(device, command.request, b"one\n    two", cut=False)

    def online(self) -> frozenset[str]:
        return frozenset(name for name, state in self.states.items() if state.online)

    def offline(self) -> frozenset[str]:
        return frozenset(name for name, state in self.states.items() if not state.online)


class HttpsServer:
    """A cloud's HTTPS plane, served over TLS from a thread; `stop` and `start` restart it on its port."""

    def __init__(self, ca: FleetCA) -> None:
        self.ca, self.port = ca, 0
        self.empty_database = ca.folder / "empty.db"  # copied for each test: making one is slow
        open_database(self.empty_database).dispose()
        self.app: FastAPI | None = None

    def start(self) -> None:
        self._serving: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="https plane")
        self._thread.start()
        self._serving.result(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(15)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        context = tls.server_context(self.ca.cloud, client_certificates=False)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # of the test that runs
            assert self.app is not None
            await self.app(scope, receive, send)

        async with serve_http(app, "127.0.0.1", self.port, context) as self.port:
            self._serving.set_result(None)
            await self._stop.wait()


class HttpPlane:
    """A fresh cloud's HTTPS plane on its real parts."""

    def __init__(self, folder: Path, server: HttpsServer) -> None:
        self.folder, self.server, self.ca, self.port = folder, server, server.ca, server.port
        self.url = f"https://127.0.0.1:{server.port}"
        self.clock = ManualClock(1_000_000.0)
        self.key, self.link = new_fleet_key(), HeardLink()
        shutil.copy(server.empty_database, folder / "cloud.db")
        self.engine, self.blobs = open_database(folder / "cloud.db"), BlobStore(folder / "blobs")
        self.jobs = Jobs(self.engine, self.blobs, lambda bundle: sign(bundle, self.key))
        self.board = ChoiceBoard()
        self.control = JobControl(
            self.engine, self.jobs, self.blobs, lambda bundle: sign(bundle, self.key), self.board
        )  # fmt: skip
        self.enrolment = Enrolment(self.engine, self.ca.folder, self.clock)
        self.registry = Registry(self.engine, self.blobs, self.key, self.clock)
        self.rollouts = Rollouts(
            self.engine, self.registry, self.key,
            devices=self.enrolment.devices, send_desired=self.link.send_desired, clock=self.clock,
        )  # fmt: skip
        self.rounds, self.spool = OpenRounds(), Spool(folder / "spool")
        self.relays = Relays(
            RelayDependencies(
                RelayRows(self.engine), self.rounds, self.spool, self.link, lambda bundle: sign(bundle, self.key),
                folder / "relays",
            ),
            RelayTiming(clock=self.clock),
        )  # fmt: skip
        self.link.logs = self.logs = DeviceLogs(self.link)
        self.services = Services(
            enrolment=self.enrolment, control=self.control,
            members=Members(self.engine), registry=self.registry, rollouts=self.rollouts, jobs=self.jobs,
            blobs=self.blobs, relays=self.relays,
            link=self.link, ca_pem=self.ca.cloud.ca.read_bytes(), fleet_key_pem=public_pem(self.key), grpc_port=9440,
            broker_url="mqtts://:8883", operator_token=OPERATOR, max_blob_bytes=5 << 20, heartbeat_s=0.1,
            chunk_deadline_s=0.5, device_logs=self.logs, log_file=folder / "cloud.log",
        )  # fmt: skip
        self.credentials = write_operator_credentials(
            folder, self.url, self.services.operator_token, self.services.ca_pem
        )
        server.app = make_app(self.services)

    def enroll(self, *names: str, **tags: str) -> None:
        for name in names:
            secret, _ = tls.parse_token(self.enrolment.new_token())
            identity = Identity.in_folder(self.folder)
            self.enrolment.enroll(secret, name, tags, tls.new_request(identity, name))


@pytest.fixture(scope="session")
def https_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpsServer]:
    """One server for all tests: starting and stopping it takes longer than most of them."""
    server = HttpsServer(make_fleet_ca(tmp_path_factory.mktemp("https") / "ca"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def http_plane(tmp_path: Path, https_server: HttpsServer) -> Iterator[HttpPlane]:
    """The HTTPS plane of a fresh cloud, running."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    plane = HttpPlane(folder, https_server)
    yield plane
    plane.engine.dispose()


class PlayedDevices:
    """Devices of an HTTPS plane that are online and answer messages by a function of a test's: bytes, or a reason."""

    def __init__(self, plane: HttpPlane, respond: Callable[[str, Deliver, bytes], bytes | str | None]) -> None:
        self._plane, self._respond = plane, respond
        self._threads = ThreadPoolExecutor(2, "device")
        plane.link.send_job = self.send_job  # type: ignore[method-assign]

    def enroll(self, *names: str) -> None:
        self._plane.enroll(*names)
        for name in names:
            self._plane.link.states[name] = DeviceState(session=1, online=True, agent_version="0")

    def send_job(self, device: str, message: Deliver | RoundClosed) -> None:
        self._plane.link.told.append((device, message))
        if isinstance(message, Deliver):
            self._threads.submit(self.answer, device, message).add_done_callback(lambda done: done.result())

    def answer(self, device: str, plan: Deliver) -> None:
        opened = self._plane.rounds.get(plan.job, plan.round)
        assert opened is not None
        assert opened.source is not None
        assert opened.record is not None
        said = self._respond(device, plan, opened.source.read_bytes())
        if isinstance(said, str):
            opened.accept(AnswerRow(device=device, reason=said), opened.record)
        elif said is not None:
            file = self._plane.spool.file(plan.job, plan.round, device)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(said)
            opened.accept(AnswerRow(device=device, file=str(file)), opened.record)

    def close(self) -> None:
        self._threads.shutdown(wait=True)


@pytest.fixture
def play_devices(http_plane: HttpPlane) -> Iterator[Callable[..., PlayedDevices]]:
    """`play_devices(respond, *names)`: devices that answer messages with `respond(device, plan, content)`."""
    played: list[PlayedDevices] = []

    def play(respond: Callable[[str, Deliver, bytes], bytes | str | None], *names: str) -> PlayedDevices:
        played.append(PlayedDevices(http_plane, respond))
        played[-1].enroll(*names)
        return played[-1]

    yield play
    for one in played:
        one.close()
