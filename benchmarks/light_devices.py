"""How many light devices one cloud can hold, and how long a round of all of them takes: over MQTT and gRPC, with TLS.

One process holds them all (`light_device.py`), each with a certificate of its own; the cloud is a separate process
with mosquitto as its child, where it is installed. Measured are the cloud's memory and CPU while all are connected and
idle, how long an operator's list takes, and rounds in which each downloads and uploads 0.1 MB.

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
from typing import Self

import psutil
import uvloop

from benchmarks.folding import write_model
from benchmarks.light_device import CONNECT_S, LightDevice, Told, Update, Where
from benchmarks.memory import peak_rss_mb
from benchmarks.report import Row, Target, command, median
from benchmarks.workload import RunFailedError
from cloud.state.blobs import blake3_of
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from edgefl.config import JobConfig, from_dict
from edgefl.errors import EdgeflError
from edgefl.local_fleet import LocalFleet
from edgefl.operator.client import CloudClient
from edgefl.operator.credentials import load_credentials
from edgefl.operator.run import upload_file
from edgefl.process.children import die_with_parent
from edgefl.process.descriptors import raise_limit
from edgefl.protocols.tls import Identity, new_request, parse_token

MANY, FEW = 2000, 200
AT_A_TIME = 40  # devices that connect at the same time
IDLE_S = 20.0  # duration of the CPU measurement
UPDATE_BYTES = 100_000
NUM_ROUNDS, ROUND_S = 5, 5.0  # rounds of a job; the target for a round of MANY
DEADLINE_S = 1800.0  # of a round


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
    """Devices in a process of their own, connected until the context ends."""

    def __init__(
        self, fleet: LocalFleet, homes: Sequence[Path], *, announce: bool = True, update: Path | None = None
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        where = Where(mqtt_port=fleet.mqtt_port, grpc_port=fleet.grpc_port, announce=announce, update=update)
        self._stop: Event = spawn.Event()
        self._told: Queue[Told] = spawn.Queue()
        self._num_devices = len(homes)
        self.process = spawn.Process(target=_work, args=(where, homes, self._told, self._stop), daemon=True)

    def __enter__(self) -> Self:
        self.process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()

    def told(self, within_s: float = CONNECT_S) -> list[Told]:
        """Return the results of every device's first connections, over MQTT and gRPC."""
        until_s = time.monotonic() + within_s
        return [self._told.get(timeout=max(0.1, until_s - time.monotonic())) for _ in range(2 * self._num_devices)]

    def refused(self) -> list[Told]:
        """Return what was refused since `told`."""
        found = []
        while not self._told.empty():
            found.append(self._told.get())
        return found


def _work(where: Where, homes: Sequence[Path], told: Queue[Told], stop: Event) -> None:
    die_with_parent()
    raise_limit()
    uvloop.run(_run(where, homes, told, stop))  # the devices share the machine with the cloud, and should take little


async def _run(where: Where, homes: Sequence[Path], told: Queue[Told], stop: Event) -> None:
    turns, update = asyncio.Semaphore(AT_A_TIME), None
    if where.update is not None:
        update = Update(data=where.update.read_bytes(), blake3=blake3_of(where.update))
    devices = [LightDevice(where, home, told, update) for home in homes]
    tasks = [asyncio.create_task(part) for one in devices for part in (one.hold_mqtt(turns), one.hold_grpc(turns))]
    await asyncio.to_thread(stop.wait)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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
    workload = f"{num_devices} light devices"
    with tempfile.TemporaryDirectory(prefix="edgefl-", ignore_cleanup_errors=True) as folder:
        try:
            with LocalFleet(Path(folder)) as fleet:
                fleet.start()
                seen = connected(fleet, num_devices)
        except (EdgeflError, RunFailedError) as cause:
            yield Row(workload=workload, metric="online", unit="devices", skipped=str(cause))
            return
    targets = (Target(of="ours", at_least=num_devices),)
    yield Row(workload=workload, metric="online", unit="devices", ours=seen.num_online, targets=targets,
              more_is_better=True, detail={"refused": seen.refused})  # fmt: skip
    yield Row(workload=workload, metric="all connected after", unit="s", ours=seen.connect_s)
    yield Row(workload=workload, metric="memory of the cloud, idle", unit="MB", ours=seen.idle_mb)
    yield Row(workload=workload, metric="memory of a device there", unit="kB", ours=seen.device_kb)
    yield Row(workload=workload, metric="CPU of the cloud, idle", unit="% of a core", ours=seen.cpu_percent)
    yield Row(workload=workload, metric="operator's list", unit="s", ours=seen.list_s)
    yield Row(workload=workload, metric=f"a round of all, {UPDATE_BYTES / 1e6:g} MB each", unit="s",
              ours=median(seen.rounds.seconds), targets=(Target(of="ours", at_most=ROUND_S * num_devices / MANY),),
              detail={"seconds": seen.rounds.seconds, "admitted": seen.rounds.admitted})  # fmt: skip
    yield Row(workload=workload, metric="CPU of the cloud, a round", unit="s", ours=seen.rounds.cloud_cpu_s)
    yield Row(workload=workload, metric="CPU of the devices, a round", unit="s", ours=seen.rounds.devices_cpu_s)
    yield Row(workload=workload, metric="peak memory of the cloud", unit="MB", ours=seen.rounds.peak_mb)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """Rounds of all devices."""

    seconds: list[float]  # of each round, by the cloud
    admitted: list[int]
    cloud_cpu_s: float  # a round: the cloud alone, without its broker
    devices_cpu_s: float  # a round: the process of all devices
    peak_mb: float  # the cloud alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A cloud with all its light devices."""

    num_online: int
    refused: list[str]
    connect_s: float
    idle_mb: float
    device_kb: float
    cpu_percent: float
    list_s: float
    rounds: Rounds


def connected(fleet: LocalFleet, num_devices: int) -> Seen:
    """Connect light devices to a running fleet, and measure its cloud; raises RunFailedError if a job fails."""
    cloud = psutil.Process(fleet.cloud.pid if fleet.cloud else None)
    empty_mb = cloud.memory_info().rss / 1e6
    model, update = fleet.folder / "model", fleet.folder / "update"
    for number, path in enumerate((model, update)):
        write_model(path, UPDATE_BYTES, seed=number)
    print(f"{num_devices} devices: enrolling ...", file=sys.stderr, flush=True)
    homes = enrol(fleet, [f"light-{number}" for number in range(num_devices)])
    print(f"{num_devices} devices: connecting ...", file=sys.stderr, flush=True)
    began_s = time.monotonic()
    with LightDevices(fleet, homes, update=update) as devices:
        refused = [f"{one.device} {one.door}: {one.refusal}" for one in devices.told() if one.refusal]
        connect_s = time.monotonic() - began_s
        cpu_s = sum(cloud.cpu_times()[:2])
        time.sleep(IDLE_S)
        cpu_percent = 100 * (sum(cloud.cpu_times()[:2]) - cpu_s) / IDLE_S
        num_online, list_s = online(fleet)
        idle_mb = cloud.memory_info().rss / 1e6
        print(f"{num_devices} devices: rounds ...", file=sys.stderr, flush=True)
        rounds = _rounds(fleet, devices, model, num_devices)
    return Seen(
        num_online=num_online, refused=refused, connect_s=connect_s, idle_mb=idle_mb,
        device_kb=1e3 * (idle_mb - empty_mb) / num_devices, cpu_percent=cpu_percent, list_s=list_s, rounds=rounds,
    )  # fmt: skip


def _rounds(fleet: LocalFleet, devices: LightDevices, model: Path, num_devices: int) -> Rounds:
    """Run rounds in which every device sends an update."""
    processes = [psutil.Process(fleet.cloud.pid if fleet.cloud else None), psutil.Process(devices.process.pid)]
    before = [sum(one.cpu_times()[:2]) for one in processes]
    with CloudClient(fleet.url, load_credentials(fleet.credentials)) as client:
        job = submit_untrained(client, model, fleet.folder, NUM_ROUNDS, num_devices)
        events = [one for one in client.job_events(job) if "round" in one or "state" in one]  # no heartbeats
    cpu_s = [(sum(one.cpu_times()[:2]) - then) / NUM_ROUNDS for one, then in zip(processes, before, strict=True)]
    if events[-1].get("state") != "done":
        refused = [f"{one.device}: {one.refusal}" for one in devices.refused()][:3]
        raise RunFailedError(f"the job ended as {events[-1].get('state')}: {events[-1].get('error')} {refused}"[:500])
    return Rounds(
        seconds=[float(one["seconds"]) for one in events[:-1]], admitted=[int(one["admitted"]) for one in events[:-1]],
        cloud_cpu_s=cpu_s[0], devices_cpu_s=cpu_s[1], peak_mb=peak_rss_mb(processes[0].pid),
    )  # fmt: skip


def submit_untrained(client: CloudClient, model: Path, folder: Path, rounds: int, num_devices: int) -> str:
    """Start a job of no task, for devices that do not train; each of its rounds needs all of them."""
    bundle = folder / "bundle"
    bundle.write_bytes(b"of no task: nothing is trained")
    said = {"count": rounds, "quorum": num_devices, "evaluate_every": 0, "deadline_s": DEADLINE_S, "wait_s": 120.0}
    config = from_dict(JobConfig, {"rounds": said, "server": {"lr": 0.5}})
    return client.submit_job("t:t", upload_file(client, bundle), upload_file(client, model), [], config)


if __name__ == "__main__":
    command(measure, __doc__)()
