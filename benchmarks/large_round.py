"""One round of a large model in a real cloud: devices enrolled over TLS that upload an update from a file.

The devices do not train: a trainer has to hold the model, and this is about the centre. They send two files in turn,
each device with another weight, one after another; to the cloud, or to a region below it. Measured is the peak of
resident memory of the cloud, and of the region, over the upload of the model, the updates, the fold, the step and the
new model; and whether the new model has the bits of a fold in other blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks.folding import Weighted, fold_alone, write_model
from benchmarks.light_device import LightDevice, Where
from benchmarks.light_devices import enrol, submit_untrained
from benchmarks.memory import tree_peak_rss_mb
from benchmarks.workload import RunFailedError
from cloud.state.blobs import blake3_of
from edgefl.errors import EdgeflError
from edgefl.local_fleet import LocalFleet
from edgefl.operator.client import CloudClient
from edgefl.operator.credentials import load_credentials
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.assignments import unpack
from edgefl.protocols.chunks import CHUNK_BYTES, encode_upload
from edgefl.protocols.messages import Fit
from edgefl.protocols.tls import REGION_DOMAIN, Identity

ROUND_S = 1800.0  # deadline
ASK_S = 0.5  # between two `Next` until the round is open
OTHER_BLOCK = 10_007  # elements


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeRound:
    """What was measured."""

    cloud_peak_mb: float  # the cloud with its broker
    cloud_idle_mb: float
    region_peak_mb: float  # 0 without a region
    region_idle_mb: float
    seconds: float  # of the round, by the cloud
    fold_peak_mb: float  # of a process that only folds
    fold_s: float
    is_identical: bool  # the cloud's model, and the folds in blocks of two sizes


def large_round(num_bytes: int, num_devices: int, region: str = "") -> LargeRound:
    """Run it, with a region of this name if there is one; raises RunFailedError.

    Needs disk space for the model, for an update, and for all updates and four.
    """
    with tempfile.TemporaryDirectory(prefix="edgefl-", ignore_cleanup_errors=True) as folder:
        try:
            return _measured(Path(folder), num_bytes, num_devices, region)
        except (EdgeflError, grpc.RpcError, TimeoutError) as cause:
            raise RunFailedError(f"{cause!r:.500}") from cause


def _measured(folder: Path, num_bytes: int, num_devices: int, region: str) -> LargeRound:
    model, update = folder / "model", folder / "update"
    write_model(model, num_bytes)
    write_model(update, num_bytes, seed=1)
    updates = [(float(number), update if number % 2 else model) for number in range(1, num_devices + 1)]
    with LocalFleet(folder) as fleet:
        fleet.start()
        if region:
            fleet.start_region(region)
        processes = [one.pid if one is not None else 0 for one in (fleet.cloud, fleet.regions.get(region))]
        idle_mb = [tree_peak_rss_mb(pid) if pid else 0.0 for pid in processes]
        homes = enrol(fleet, [f"device-{number}" for number in range(num_devices)])
        where = _where(fleet, region)
        with _client(fleet) as client:
            if region:
                client.assign_devices("device-*", [region])
            with _online(where, homes):
                job = submit_untrained(client, model, folder, 1, num_devices)
                asyncio.run(_send_all(where, homes, updates))
                events = [one for one in client.job_events(job) if "round" in one or "state" in one]  # no heartbeats
        peak_mb = [tree_peak_rss_mb(pid) if pid else 0.0 for pid in processes]
        end = events[-1]
        if end.get("state") != "done":
            raise RunFailedError(f"the job ended as {end.get('state')}: {end.get('error')}")
        seconds = float(events[0]["seconds"])
    folded = [fold_alone(model, updates, block, region=bool(region)) for block in (None, OTHER_BLOCK)]
    return LargeRound(
        cloud_peak_mb=peak_mb[0], cloud_idle_mb=idle_mb[0], region_peak_mb=peak_mb[1], region_idle_mb=idle_mb[1],
        seconds=seconds, fold_peak_mb=max(one["peak_mb"] for one in folded), fold_s=folded[0]["seconds"],
        is_identical={one["sha256"] for one in folded} == {end["model"]["sha256"]},
    )  # fmt: skip


def _where(fleet: LocalFleet, region: str) -> Where:
    """Return the doors of the region, or of the cloud."""
    if not region:
        return Where(mqtt_port=fleet.mqtt_port, grpc_port=fleet.grpc_port, announce=True)
    grpc_port, _, mqtt_port = fleet.region_ports[region]
    return Where(mqtt_port=mqtt_port, grpc_port=grpc_port, announce=True, server_name=region + REGION_DOMAIN)


def _client(fleet: LocalFleet) -> CloudClient:
    return CloudClient(fleet.url, load_credentials(fleet.home / "operator.json"))


@contextlib.contextmanager
def _online(where: Where, homes: list[Path]) -> Iterator[None]:
    """Keep devices online, over MQTT, in a process of their own."""
    spawn = multiprocessing.get_context("spawn")
    stop, told = spawn.Event(), spawn.Queue()
    process = spawn.Process(target=_hold, args=(where, homes, told, stop), daemon=True)
    process.start()
    try:
        for _ in homes:
            if refusal := told.get(timeout=60).refusal:
                raise RunFailedError(f"a device is not connected: {refusal}")
        yield
    finally:
        stop.set()
        process.join(10)
        process.kill()


def _hold(where: Where, homes: list[Path], told: Any, stop: Any) -> None:
    async def hold() -> None:
        turns = asyncio.Semaphore(len(homes))
        tasks = [asyncio.create_task(LightDevice(where, home, told).hold_mqtt(turns)) for home in homes]
        await asyncio.to_thread(stop.wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(hold())


async def _send_all(where: Where, homes: list[Path], updates: Weighted) -> None:
    async with asyncio.timeout(ROUND_S):
        for home, (weight, update) in zip(homes, updates, strict=True):
            blake3 = await asyncio.to_thread(blake3_of, update)
            size = (await asyncio.to_thread(update.stat)).st_size
            async with where.channel(Identity.in_folder(home)) as channel:
                fit = await _asked(channel)
                header = pb.UploadHeader(
                    key=pb.UpdateKey(job=fit.job, round=fit.round), size=size, blake3=blake3, weight=weight
                )
                send: Any = channel.stream_unary("/edgefl.v1.Fleet/Upload", None, pb.UploadState.FromString)
                state = await send(_messages(update, header))
                if state.status != pb.UploadState.STORED:
                    raise RunFailedError(f"{home.name}: the upload is {state.status}: {state.reason}")


async def _asked(channel: grpc.aio.Channel) -> Fit:
    ask: Any = channel.unary_unary("/edgefl.v1.Fleet/Next", pb.NextRequest.SerializeToString, pb.NextReply.FromString)
    while True:
        reply = await ask(pb.NextRequest(agent_version="large", knows=["fit"]), wait_for_ready=True)
        for assignment in unpack(reply):
            if isinstance(assignment, Fit):
                return assignment
        await asyncio.sleep(ASK_S)


async def _messages(update: Path, header: pb.UploadHeader) -> AsyncIterator[bytes]:
    yield pb.UploadChunk(header=header).SerializeToString()
    with update.open("rb", buffering=0) as file:
        while data := file.read(CHUNK_BYTES):
            yield encode_upload(data)
