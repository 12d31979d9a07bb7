"""The cloud's part of a split model: what the stage server adds, and what stages, requests in flight and merging bring.

The head runs here, as on a device; the tail in `edgefl cloud stages`, without TLS, as the floor's echo. The floor of
the split path is the head, an echo of the same bytes over bare grpc.aio in another process, and the tail in ONNX
Runtime on as many cores.

    python -m benchmarks.stages [--quick] [--json F]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import grpc
import numpy as np

from benchmarks.report import Row, Target, command
from benchmarks.stages_echo import ECHO
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from edgefl.models.session import new_session
from edgefl.process.home import create_home
from edgefl.protocols import tls
from edgefl.protocols.inference.service import InferenceStub
from edgefl.protocols.inference.tensors import make_request
from edgefl.protocols.ports.listener import listen
from edgefl.trees import Array

START_S = 300.0  # also on a busy machine
DEVICES = [f"d{number}" for number in range(16)]
DEVICE_METADATA = "edgefl-device"
BORDER, MIDDLE = "h0", "h4"  # where the head ends, and where two stages divide the tail


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The model: a head of one layer and a tail of eight, each (width, width), on so many rows."""

    width: int
    rows: int
    requests: int


def measure(*, quick: bool) -> Iterator[Row]:
    """Run everything, and yield the rows as they are done."""
    small = Size(width=256, rows=1, requests=200 if quick else 2000)
    large = Size(width=1024, rows=16, requests=24 if quick else 200)
    yield _above_floor(small)
    yield _two_stages(large)
    yield _in_flight(large)
    yield _sixteen_devices(Size(width=512, rows=1, requests=160 if quick else 3200))


def _above_floor(size: Size) -> Row:
    with files_of(size) as files, served(files, "--tail-from", BORDER) as port, echo() as bare:
        ours, floor = asyncio.run(_compared(files, size, port, bare))
    return Row(
        workload=f"split path, {size.width * size.rows * 4} bytes at the cut", metric="p50 above the floor", unit="ms",
        ours=ours - floor, limit=None, targets=(Target(of="ours", at_most=1.0),),
        detail={"whole_ms": ours, "floor_ms": floor},
    )  # fmt: skip


async def _compared(files: Files, size: Size, port: int, echo: int) -> tuple[float, float]:
    """Return the medians (ms) of the split path and of its floor, which take turns."""
    head, tail = files.session("head"), files.session("tail")
    feeds = {"x": files.x}
    async with channel(port) as stages, channel(echo) as bare:
        stub, call = InferenceStub(stages), bare.unary_unary(ECHO)

        async def split() -> None:
            (border,) = head.run(None, feeds)
            await stub.ModelInfer(make_request("model", {BORDER: border}), metadata=_as(DEVICES[0]))

        async def floor() -> None:
            (border,) = head.run(None, feeds)
            data = await call(border.tobytes())
            tail.run(None, {BORDER: np.frombuffer(data, np.float32).reshape(border.shape)})

        samples: dict[str, list[float]] = {"split": [], "floor": []}
        for number in range(size.requests):
            for name, once in (("split", split), ("floor", floor)):
                begun_s = time.perf_counter()
                await once()
                if number >= size.requests // 10:
                    samples[name].append((time.perf_counter() - begun_s) * 1e3)
    return statistics.median(samples["split"]), statistics.median(samples["floor"])


def _two_stages(size: Size) -> Row:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return Row(workload="two stages", metric="requests", unit="1/s", skipped="needs two cores")
    with files_of(size) as files:
        tail = ("--tail-from", BORDER, "--max-batch", str(size.rows))
        with served(files, *tail, "--cores", str(cores[0])) as port:
            one = asyncio.run(_rate(files, size, port, in_flight=8))
        with served(files, *tail, "--cuts", MIDDLE, *(f"--cores={core}" for core in cores)) as port:
            two = asyncio.run(_rate(files, size, port, in_flight=8))
    return Row(
        workload=f"CPU-bound tail, {size.rows} rows of {size.width}, 8 in flight", metric="two stages on two cores",
        unit="requests/s", ours=two, rival="edgefl, one stage on one core", theirs=one, more_is_better=True,
        targets=(Target(of="ratio", at_least=1.6),),
    )  # fmt: skip


def _in_flight(size: Size) -> Row:
    core = str(max(os.sched_getaffinity(0)))
    with files_of(size, head_layers=8) as files, served(files, "--tail-from", "h7", "--cores", core) as port:
        rates = {n: asyncio.run(_rate(files, size, port, in_flight=n, with_head=True)) for n in (1, 4)}
    return Row(
        workload=f"head and tail of 8 layers each, {size.rows} rows of {size.width}", metric="4 in flight",
        unit="requests/s", ours=rates[4], rival="edgefl, one at a time", theirs=rates[1], more_is_better=True,
        targets=(Target(of="ratio", at_least=1.7),),
    )  # fmt: skip


def _sixteen_devices(size: Size) -> Row:
    with files_of(size) as files, served(files, "--tail-from", BORDER) as port:
        one = asyncio.run(_rate(files, size, port, in_flight=1))
        many = asyncio.run(_rate(files, size, port, in_flight=16, devices=16))
    return Row(
        workload=f"16 devices, {size.rows} row of {size.width}", metric="one request each in flight",
        unit="requests/s", ours=many, rival="edgefl, one device", theirs=one, more_is_better=True,
    )  # fmt: skip


async def _rate(
    files: Files, size: Size, port: int, *, in_flight: int, devices: int = 1, with_head: bool = False
) -> float:
    """Return the requests per second of closed loops."""
    head = files.session("head")
    (border,) = await asyncio.to_thread(head.run, None, {"x": files.x})
    name = files.border
    async with contextlib.AsyncExitStack() as stack:
        stubs = [InferenceStub(await stack.enter_async_context(channel(port))) for _ in range(devices)]

        async def once(number: int) -> None:
            values: Array = border
            if with_head:
                (values,) = await asyncio.to_thread(head.run, None, {"x": files.x})
            device = number % devices
            await stubs[device].ModelInfer(make_request("model", {name: values}), metadata=_as(DEVICES[device]))

        await _closed_loops(once, in_flight, 2 * in_flight)
        begun_s = time.perf_counter()
        await _closed_loops(once, in_flight, size.requests)
        return size.requests / (time.perf_counter() - begun_s)


async def _closed_loops(once: Callable[[int], Awaitable[None]], loops: int, total: int) -> None:
    left = iter(range(total))

    async def loop(number: int) -> None:
        for _ in left:
            await once(number)

    await asyncio.gather(*(loop(number) for number in range(loops)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """A folder with the whole model, its head and its tail."""

    folder: Path
    x: Array
    border: str

    def session(self, part: str) -> object:
        return new_session(self.folder / f"{part}.onnx", threads=1)


@contextlib.contextmanager
def files_of(size: Size, head_layers: int = 1) -> Iterator[Files]:
    """Write the model, and a cloud's home with the devices."""
    from benchmarks.stages_model import write_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        border = write_model(folder, size.width, head_layers, tail_layers=8)
        make_home(folder / "home")
        x = np.random.default_rng(0).normal(size=(size.rows, size.width)).astype(np.float32)
        yield Files(folder=folder, x=x, border=border)


def make_home(home: Path) -> None:
    create_home(home, "cloud")
    (home / "tls").mkdir()
    tls.create_ca(home / "tls")
    engine = open_database(home / "cloud.db")
    enrolment = Enrolment(engine, home / "tls")
    for device in DEVICES:
        secret, _ = tls.parse_token(enrolment.new_token())
        identity = tls.Identity(home / f"{device}.key", home / f"{device}.pem", home / "tls" / "ca.pem")
        enrolment.enroll(secret, device, {}, tls.new_request(identity, device))
    engine.dispose()


@contextlib.contextmanager
def served(files: Files, *options: str) -> Iterator[int]:
    port = _free_port()
    arguments = [
        "cloud",
        "stages",
        str(files.folder / "model.onnx"),
        "--home",
        str(files.folder / "home"),
        "--insecure",
    ]
    with running([sys.executable, "-m", "edgefl", *arguments, "--port", str(port), *options], "stages.ready"):
        yield port


@contextlib.contextmanager
def echo() -> Iterator[int]:
    port = _free_port()
    with running([sys.executable, "-m", "benchmarks.stages_echo", str(port)], "ready"):
        yield port


@contextlib.contextmanager
def running(arguments: list[str], ready: str) -> Iterator[None]:
    """Run a process until the end of the block; begin when it has written `ready`."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, cwd=Path(__file__).parents[1])
        try:
            end_s = time.monotonic() + START_S
            while ready not in _text(log):
                if process.poll() is not None or time.monotonic() > end_s:
                    raise RuntimeError(f"{arguments[2]} did not start: {_text(log)}")
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


def _free_port() -> int:
    with listen("127.0.0.1", 0, "") as listener:
        return int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def channel(port: int) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        await channel.channel_ready()
        yield channel


def _as(device: str) -> tuple[tuple[str, str], ...]:
    return ((DEVICE_METADATA, device),)


if __name__ == "__main__":
    command(measure, __doc__)()
