"""One round of a large model in a real cloud: devices enrolled over TLS that upload an update from a file.

The devices do not train: a trainer has to hold the model, and this is about the centre. Each sends the same file with
another weight, one after another. Measured is the peak of the cloud's resident memory, over the upload of the model,
the updates, the fold, the step and the new model; and whether the new model has the bits of a fold in other blocks.
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
from benchmarks.light_devices import Where, enrol, hold_mqtt
from benchmarks.memory import tree_peak_rss_mb
from benchmarks.workload import RunFailedError
from cloud.state.blobs import blake3_of
from edgefl.config import JobConfig, from_dict
from edgefl.errors import EdgeflError
from edgefl.local_fleet import LocalFleet
from edgefl.operator.client import CloudClient
from edgefl.operator.credentials import load_credentials
from edgefl.operator.run import upload_file
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.assignments import unpack
from edgefl.protocols.chunks import CHUNK_BYTES, encode_upload
from edgefl.protocols.messages import Fit
from edgefl.protocols.tls import Identity, grpc_channel_credentials

ROUND_S = 1800.0  # deadline
ASK_S = 0.5  # between two `Next` until the round is open
OTHER_BLOCK = 10_007  # elements


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeRound:
    """What was measured."""

    cloud_peak_mb: float  # the cloud with its broker
    cloud_idle_mb: float
    seconds: float  # of the round, by the cloud
    fold_peak_mb: float  # of a process that only folds
    fold_s: float
    is_identical: bool  # the cloud's model, and the folds in blocks of two sizes


def large_round(num_bytes: int, num_devices: int) -> LargeRound:
    """Run it; raises RunFailedError. Needs disk space for the update, and for as many again and two."""
    with tempfile.TemporaryDirectory(prefix="edgefl-", ignore_cleanup_errors=True) as folder:
        try:
            return _measured(Path(folder), num_bytes, num_devices)
        except (EdgeflError, grpc.RpcError, TimeoutError) as cause:
            raise RunFailedError(f"{cause!r:.500}") from cause


def _measured(folder: Path, num_bytes: int, num_devices: int) -> LargeRound:
    model, update = folder / "model", folder / "update"
    write_model(model, num_bytes)
    write_model(update, num_bytes, seed=1)
    weights = [float(number) for number in range(1, num_devices + 1)]
    with LocalFleet(folder) as fleet:
        fleet.start()
        assert fleet.cloud is not None  # noqa: S101 - ours alone: `start` has started it
        idle_mb = tree_peak_rss_mb(fleet.cloud.pid)
        names = [f"device-{number}" for number in range(num_devices)]
        homes = enrol(fleet, names)
        with _client(fleet) as client, _online(fleet, homes):
            job = _submit(client, model, folder, num_devices)
            asyncio.run(_send_all(fleet, homes, update, weights))
            events = [one for one in client.job_events(job) if "round" in one or "state" in one]  # no heartbeats
        peak_mb = tree_peak_rss_mb(fleet.cloud.pid)
        end = events[-1]
        if end.get("state") != "done":
            raise RunFailedError(f"the job ended as {end.get('state')}: {end.get('error')}")
        seconds = float(events[0]["seconds"])
    folded = _folds(model, [(weight, update) for weight in weights])
    return LargeRound(
        cloud_peak_mb=peak_mb, cloud_idle_mb=idle_mb, seconds=seconds,
        fold_peak_mb=max(one["peak_mb"] for one in folded), fold_s=folded[0]["seconds"],
        is_identical={one["sha256"] for one in folded} == {end["model"]["sha256"]},
    )  # fmt: skip


def _folds(model: Path, updates: Weighted) -> list[dict[str, Any]]:
    return [fold_alone(model, updates), fold_alone(model, updates, OTHER_BLOCK)]


def _client(fleet: LocalFleet) -> CloudClient:
    return CloudClient(fleet.url, load_credentials(fleet.home / "operator.json"))


def _submit(client: CloudClient, model: Path, folder: Path, num_devices: int) -> str:
    bundle = folder / "bundle"
    bundle.write_bytes(b"of no task: nothing is trained")
    rounds = {"count": 1, "quorum": num_devices, "evaluate_every": 0, "deadline_s": ROUND_S, "wait_s": 120.0}
    config = from_dict(JobConfig, {"rounds": rounds, "server": {"lr": 0.5}})
    return client.submit_job("t:t", upload_file(client, bundle), upload_file(client, model), [], config)


@contextlib.contextmanager
def _online(fleet: LocalFleet, homes: list[Path]) -> Iterator[None]:
    """Keep devices online, over MQTT, in a process of their own."""
    spawn = multiprocessing.get_context("spawn")
    stop, told = spawn.Event(), spawn.Queue()
    where = Where(mqtt_port=fleet.mqtt_port, grpc_port=fleet.grpc_port, announce=True)
    process = spawn.Process(target=_hold, args=(where, homes, told, stop), daemon=True)
    process.start()
    try:
        for _ in homes:
            told.get(timeout=60)
        yield
    finally:
        stop.set()
        process.join(10)
        process.kill()


def _hold(where: Where, homes: list[Path], told: Any, stop: Any) -> None:
    async def hold() -> None:
        turns = asyncio.Semaphore(len(homes))
        tasks = [asyncio.create_task(hold_mqtt(where, home, told, turns)) for home in homes]
        await asyncio.to_thread(stop.wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(hold())


async def _send_all(fleet: LocalFleet, homes: list[Path], update: Path, weights: list[float]) -> None:
    blake3, size = await asyncio.to_thread(blake3_of, update), (await asyncio.to_thread(update.stat)).st_size
    async with asyncio.timeout(ROUND_S):
        for home, weight in zip(homes, weights, strict=True):
            credentials = grpc_channel_credentials(Identity.in_folder(home))
            async with grpc.aio.secure_channel(f"127.0.0.1:{fleet.grpc_port}", credentials) as channel:
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
