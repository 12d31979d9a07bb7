"""A job's training process: started, killed and started again; a device that ends it is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cloud.split.process import JobProcess, SessionEnded
from cloud.split.records import SessionSpec
from cloud.split.results import SplitFolder
from edgefl.bundle import pack_bundle
from edgefl.offload.training.layout import layout_of
from edgefl.protocols.split.messages import BeginTraining, FinishTraining, pack, parse_frame
from edgefl.task import load_task
from edgefl.training.local import initial_parameters
from edgefl.training.samples import train_samples
from edgefl.trees import write_tree
from tests.cloud.split.bench import settings

TASK = Path(__file__).parents[2] / "e2e" / "tasks" / "split"


def process_of(home: Path) -> tuple[JobProcess, SessionSpec, BeginTraining]:
    packed, task = pack_bundle(str(TASK)), load_task(str(TASK))
    bundle, tensors = home / "bundle.zip", home / "tensors"
    bundle.write_bytes(packed.data)
    with tensors.open("wb") as file:
        write_tree(initial_parameters(task), file)
    folder = SplitFolder(home, "job-1")
    folder.work.mkdir(parents=True)
    train, inputs = settings(), layout_of(train_samples(task, {}).first(8).inputs)
    spec = SessionSpec(device="cam-1", round=1, tensors=str(tensors), train=train, inputs=inputs, samples=48, steps=6)
    config = {
        "job": "job-1",
        "bundle": str(bundle),
        "task": packed.task,
        "home": str(home),
        "memory_mb": 0,
        "threads": 1,
        "cache_bytes": 1 << 20,
        "device_cache_bytes": 1 << 20,
        "train": dataclasses.asdict(train),
    }
    begin = BeginTraining(version=1, job="job-1", round=1, bundle="", samples=48, steps=6, inputs=inputs)
    return JobProcess("job-1", config, folder.work, load_s=300.0, run_s=300.0), spec, begin


def body(message: Any) -> bytes:
    return pack(message)[4:]


def test_a_killed_process_ends_its_sessions_and_starts_again(tmp_path: Path) -> None:
    async def run() -> None:
        process, spec, begin = process_of(tmp_path)
        session = await process.open(spec)
        await session.send(body(begin))
        assert parse_frame((await session.answer())[4:]).message.kind == "begun"
        first = process.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(SessionEnded, match=r"was killed by SIGKILL.*begin again") as lost:
            await session.answer()
        assert lost.value.status == "UNAVAILABLE"
        session = await process.open(spec)
        await session.send(body(begin))
        assert parse_frame((await session.answer())[4:]).message.kind == "begun"
        assert process.pid != first
        other = await process.open(spec)  # the same device on another connection
        with pytest.raises(SessionEnded, match="has begun again on another connection"):
            await session.answer()
        await other.send(body(FinishTraining()))  # a fault of this device's
        with pytest.raises(SessionEnded, match="is before step 6") as fault:
            await other.answer()
        assert fault.value.status == "INVALID_ARGUMENT"
        process.leave(other)
        assert process.num_sessions == 0
        await process.stop()
        assert process.pid == 0

    asyncio.run(run())


def test_a_bundle_that_cannot_be_loaded_is_told_to_the_device(tmp_path: Path) -> None:
    async def run() -> None:
        process, spec, _ = process_of(tmp_path)
        (tmp_path / "bundle.zip").write_bytes(b"no zip")
        with pytest.raises(SessionEnded) as refused:
            await process.open(spec)
        assert refused.value.status == "FAILED_PRECONDITION"

    asyncio.run(run())
