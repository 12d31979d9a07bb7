"""How many idle devices one cloud can hold: real certificates, MQTT and gRPC over TLS.

A light device connects to the broker, announces its presence, and asks `Next` over gRPC from time to time. They
run in a few processes, hundreds in each; the cloud is a separate process with its embedded broker. Measured are
the cloud's memory and CPU while all are connected, and how long an operator's list of devices takes.

    python -m benchmarks.light_devices [--quick] [--json F]
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Self

import grpc
import psutil

from benchmarks.report import Row, Target, command
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from edgefl.errors import EdgeflError
from edgefl.local_fleet import LocalFleet
from edgefl.process.descriptors import raise_limit
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import messages, topics
from edgefl.protocols.messages import DeviceState
from edgefl.protocols.tls import Identity, client_context, grpc_channel_credentials, new_request, parse_token

MANY, FEW = 2000, 200
WORKERS = 4
AT_A_TIME = 20  # devices of a worker that connect at the same time
ASK_EVERY_S, PING_EVERY_S = 30.0, 60.0
CONNECT_S = 300.0
IDLE_S = 20.0  # duration of the CPU measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """The addresses that a device connects to."""

    mqtt_port: int
    grpc_port: int
    announce: bool  # whether they report that they are online, and so are chosen for rounds


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """The result of a device's first connection over MQTT or gRPC."""

    device: str
    door: str  # mqtt | grpc
    refusal: str = ""  # empty: accepted


def enrol(fleet: LocalFleet, names: Sequence[str]) -> list[Path]:
    """Enrol devices directly in the cloud's database; return their homes."""
    engine = open_database(fleet.home / "cloud.db")
    enrolment = Enrolment(engine, fleet.home / "tls")
    homes = []
    for name in names:
        home = fleet.folder / "light" / name
        home.mkdir(parents=True)
        identity = Identity.in_folder(home)
        secret, _ = parse_token(enrolment.new_token())
        identity.cert.write_bytes(enrolment.enroll(secret, name, {}, new_request(identity, name)))
        identity.ca.write_bytes((fleet.home / "tls" / "ca.pem").read_bytes())
        homes.append(home)
    engine.dispose()
    return homes


class LightDevices:
    """Devices in separate processes, connected until the context ends."""

    def __init__(
        self, fleet: LocalFleet, homes: Sequence[Path], workers: int = WORKERS, *, announce: bool = True
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        where = Where(mqtt_port=fleet.mqtt_port, grpc_port=fleet.grpc_port, announce=announce)
        self._stop: Event = spawn.Event()
        self._told: Queue[Told] = spawn.Queue()
        self._num_devices = len(homes)
        self._workers = [
            spawn.Process(target=_work, args=(where, homes[index::workers], self._told, self._stop), daemon=True)
            for index in range(workers)
        ]

    def __enter__(self) -> Self:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for worker in self._workers:
            worker.join(30)
            if worker.is_alive():
                worker.kill()

    def told(self, within_s: float = CONNECT_S) -> list[Told]:
        """Return the results of every device's first connections, over MQTT and gRPC."""
        until_s = time.monotonic() + within_s
        return [self._told.get(timeout=max(0.1, until_s - time.monotonic())) for _ in range(2 * self._num_devices)]


def _work(where: Where, homes: Sequence[Path], told: Queue[Told], stop: Event) -> None:
    raise_limit()
    asyncio.run(_run(where, homes, told, stop))


async def _run(where: Where, homes: Sequence[Path], told: Queue[Told], stop: Event) -> None:
    turns = asyncio.Semaphore(AT_A_TIME)
    tasks = [asyncio.create_task(part) for home in homes for part in (
        hold_mqtt(where, home, told, turns), _hold_grpc(where, home, told, turns))]  # fmt: skip
    await asyncio.to_thread(stop.wait)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def hold_mqtt(where: Where, home: Path, told: Queue[Told], turns: asyncio.Semaphore) -> None:
    device, identity = home.name, Identity.in_folder(home)
    async with turns:
        context = client_context(identity.ca, identity)
        reader, writer = await asyncio.open_connection("127.0.0.1", where.mqtt_port, ssl=context)
        body = b"\0\4MQTT\4\2" + int(2 * PING_EVERY_S).to_bytes(2) + _text(device)
        writer.write(_packet(0x10, body))
        answer = await reader.readexactly(4)
        if answer[3]:
            told.put(Told(device=device, door="mqtt", refusal=f"CONNACK {answer[3]}"))
            writer.close()
            return
        if where.announce:
            state = DeviceState(session=1, online=True, agent_version="light", models={}, tags={}, serving_url="")
            writer.write(_packet(0x31, _text(topics.up(device, "state")) + messages.encode(state)))
            await writer.drain()
        told.put(Told(device=device, door="mqtt"))
    while True:
        await asyncio.sleep(PING_EVERY_S)
        writer.write(b"\xc0\0")
        await reader.readexactly(2)


async def _hold_grpc(where: Where, home: Path, told: Queue[Told], turns: asyncio.Semaphore) -> None:
    credentials = grpc_channel_credentials(Identity.in_folder(home))
    address, options = f"127.0.0.1:{where.grpc_port}", [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        ask: Any = channel.unary_unary(
            "/edgefl.v1.Fleet/Next", pb.NextRequest.SerializeToString, pb.NextReply.FromString
        )
        async with turns:
            try:
                await ask(pb.NextRequest(agent_version="light"), wait_for_ready=True, timeout=CONNECT_S)
            except grpc.aio.AioRpcError as error:
                told.put(Told(device=home.name, door="grpc", refusal=f"{error.code().name} {error.details()}"))
                return
            told.put(Told(device=home.name, door="grpc"))
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            await ask(pb.NextRequest(agent_version="light"), wait_for_ready=True, timeout=ASK_EVERY_S)


def _text(text: str) -> bytes:
    return len(text.encode()).to_bytes(2) + text.encode()


def _packet(head: int, body: bytes) -> bytes:
    size = bytes([len(body)]) if len(body) < 128 else bytes([len(body) & 0x7F | 0x80, len(body) >> 7])
    return bytes([head]) + size + body


def online(fleet: LocalFleet) -> tuple[int, float]:
    """Return how many devices are online in the operator's list, and how long the list took."""
    file, began_s = fleet.folder / "devices.json", time.monotonic()
    fleet.command("devices", "list", "--cloud", fleet.url, "--json", file, timeout_s=120)
    took_s = time.monotonic() - began_s
    return sum(one["online"] for one in json.loads(file.read_text(encoding="utf-8"))), took_s


def measure(*, quick: bool) -> Iterator[Row]:
    """Connect devices, and yield the cloud's costs with all of them."""
    num_devices = FEW if quick else MANY
    raise_limit()
    with tempfile.TemporaryDirectory(prefix="edgefl-", ignore_cleanup_errors=True) as folder:
        try:
            with LocalFleet(Path(folder)) as fleet:
                fleet.start()
                seen = connected(fleet, num_devices)
        except EdgeflError as cause:
            yield Row(workload=f"{num_devices} light devices", metric="online", unit="devices", skipped=str(cause))
            return
    workload = f"{num_devices} light devices"
    targets = (Target(of="ours", at_least=num_devices),)
    yield Row(workload=workload, metric="online", unit="devices", ours=seen.num_online, targets=targets,
              more_is_better=True, detail={"refused": seen.refused})  # fmt: skip
    yield Row(workload=workload, metric="all connected after", unit="s", ours=seen.connect_s)
    yield Row(workload=workload, metric="memory of the cloud", unit="MB", ours=seen.full_mb)
    yield Row(workload=workload, metric="memory of a device there", unit="kB", ours=seen.device_kb)
    yield Row(workload=workload, metric="CPU of the cloud, idle", unit="% of a core", ours=seen.cpu_percent)
    yield Row(workload=workload, metric="operator's list", unit="s", ours=seen.list_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A cloud with all its light devices."""

    num_online: int
    refused: list[str]
    connect_s: float
    full_mb: float
    device_kb: float
    cpu_percent: float
    list_s: float


def connected(fleet: LocalFleet, num_devices: int) -> Seen:
    """Connect light devices to a running fleet, and measure its cloud while they are idle."""
    cloud = psutil.Process(fleet.cloud.pid if fleet.cloud else None)
    empty_mb = cloud.memory_info().rss / 1e6
    print(f"{num_devices} devices: enrolling ...", file=sys.stderr, flush=True)
    homes = enrol(fleet, [f"light-{number}" for number in range(num_devices)])
    print(f"{num_devices} devices: connecting ...", file=sys.stderr, flush=True)
    began_s = time.monotonic()
    with LightDevices(fleet, homes) as devices:
        refused = [f"{one.device} {one.door}: {one.refusal}" for one in devices.told() if one.refusal]
        connect_s = time.monotonic() - began_s
        cpu_s = sum(cloud.cpu_times()[:2])
        time.sleep(IDLE_S)
        cpu_percent = 100 * (sum(cloud.cpu_times()[:2]) - cpu_s) / IDLE_S
        num_online, list_s = online(fleet)
        full_mb = cloud.memory_info().rss / 1e6
    return Seen(
        num_online=num_online,
        refused=refused,
        connect_s=connect_s,
        full_mb=full_mb,
        device_kb=1e3 * (full_mb - empty_mb) / num_devices,
        cpu_percent=cpu_percent,
        list_s=list_s,
    )


if __name__ == "__main__":
    command(measure, __doc__)()
