"""The lower bound of a round's time on this machine: the bytes over gRPC with mutual TLS, and the mean.

K client processes; in each round notify, model down, update up, SHA-256 on both sides, spool to disk,
weighted sum, new model. Without everything else that a product needs: jobs, guards, durability, a broker.
    python -m benchmarks.floor [--quick] [--json F]
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import BinaryIO

import grpc
import numpy as np

from benchmarks.family import Family
from benchmarks.floor_wire import DOWN, LISTEN, OPTIONS, SERVICE, UP, chunks
from benchmarks.report import Row, command, median
from benchmarks.workload import RunFailedError, RunResult, Workload, between
from edgefl.protocols import tls
from edgefl.trees import blocks

ROOT = Path(__file__).parents[1]
UPLOADS_AT_ONCE = 2  # more would only use memory: the cores are busy
START_S = 60.0
WORKLOADS = tuple(Workload(clients=clients, megabytes=size) for size in (0.1, 100) for clients in (2, 10))
_WEIGHT = 1.0
_RING, _END = "round", "end"
_OFFLOAD_BYTES = 1 << 20  # smaller chunks are processed faster than passed to a thread


def run(workload: Workload, rounds: int, deadline_s: float) -> RunResult:
    """Run `rounds` rounds after the first; raises RunFailedError."""
    with tempfile.TemporaryDirectory(prefix="floor-") as temporary:
        folder = Path(temporary)
        tls.create_ca(folder)
        with Family(folder, {"PYTHONPATH": str(ROOT)}) as family:
            try:
                return asyncio.run(_run(family, workload, rounds, deadline_s))
            except TimeoutError as cause:
                raise RunFailedError(f"the floor's {workload} did not end within {deadline_s:g} s") from cause


async def _run(family: Family, workload: Workload, rounds: int, deadline_s: float) -> RunResult:
    centre = Centre(family.folder, workload)
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((centre.handler(),))
    identity = _identity(family.folder, "server", is_server=True)
    port = server.add_secure_port("127.0.0.1:0", tls.grpc_server_credentials(identity))
    await server.start()
    try:
        async with asyncio.timeout(START_S):
            for index in range(workload.clients):
                client = _identity(family.folder, f"client-{index}", is_server=False)
                module = [sys.executable, "-m", "benchmarks.floor_client"]
                family.start(f"client-{index}", [*module, str(port), client.key.parent])
            await centre.all_listen.wait()
        async with asyncio.timeout(deadline_s):
            ends_s = [time.monotonic()]
            for _ in range(rounds + 1):
                await centre.round()
                ends_s.append(time.monotonic())
        centre.dismiss()
        await server.stop(START_S)
    finally:
        await server.stop(grace=None)
    first_s, round_s = between(ends_s)
    return RunResult(first_s=first_s, round_s=round_s)


def _identity(folder: Path, name: str, *, is_server: bool) -> tls.Identity:
    own = folder / name
    own.mkdir()
    identity = tls.Identity.in_folder(own)
    identity.ca.write_bytes((folder / "ca.pem").read_bytes())
    if is_server:
        tls.issue_server(folder, identity, ["127.0.0.1"])
    else:
        identity.cert.write_bytes(tls.sign_request(folder, tls.new_request(identity, name), name))
    return identity


@dataclass
class Centre:
    """The server's side: the model, the listeners, and the sum of the open round."""

    folder: Path
    workload: Workload
    all_listen: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.model = rng.standard_normal(self.workload.model_bytes // 4, np.float32)
        self._chunks: list[bytes] = []
        self._digest = b""
        self._total = np.zeros(self.model.size)
        self._bells: list[asyncio.Queue[str]] = []
        self._uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self._names = count()
        self._spooled: asyncio.Queue[Path] = asyncio.Queue(maxsize=self.workload.clients)

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        methods = {
            LISTEN: grpc.unary_stream_rpc_method_handler(self._listen),
            DOWN: grpc.unary_stream_rpc_method_handler(self._down),
            UP: grpc.stream_unary_rpc_method_handler(self._up),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def round(self) -> None:
        """Run one round to its end."""
        self._total[:] = 0
        data = self.model.view(np.uint8).data
        self._digest = hashlib.sha256(data).digest()
        self._chunks = list(chunks(data))
        for bell in self._bells:
            bell.put_nowait(_RING)
        await self._fold()
        self.step()

    def step(self) -> None:
        """Set the model to the mean."""
        for block in blocks(self.model.size):
            self.model[block] = self._total[block] / (_WEIGHT * self.workload.clients)

    def dismiss(self) -> None:
        """Let every client end."""
        for bell in self._bells:
            bell.put_nowait(_END)

    async def _listen(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
        bell: asyncio.Queue[str] = asyncio.Queue(maxsize=2)
        self._bells.append(bell)
        if len(self._bells) == self.workload.clients:
            self.all_listen.set()
        while await bell.get() == _RING:
            yield b""

    async def _down(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk

    async def _up(self, parts: AsyncIterator[bytes], _context: object) -> bytes:
        wanted = await anext(parts)
        spool = self.folder / f"spool-{next(self._names)}"
        async with self._uploads:
            digest = hashlib.sha256()
            with spool.open("wb") as file:
                async for chunk in parts:
                    await _offload(len(chunk), _take, chunk, digest, file)
        if digest.digest() != wanted or wanted != self._digest:
            raise RunFailedError("the floor's bytes changed on the way")
        self._spooled.put_nowait(spool)
        return b""

    async def _fold(self) -> None:
        """Add every client's update when it arrives."""
        for _ in range(self.workload.clients):
            spool = await self._spooled.get()
            await _offload(self.workload.model_bytes, self.add, spool)
            spool.unlink()

    def add(self, spool: Path) -> None:
        """Fold one update."""
        update = np.memmap(spool, np.float32, "r")
        for block in blocks(update.size):
            self._total[block] += _WEIGHT * update[block]


def _take(chunk: bytes, digest: hashlib._Hash, file: BinaryIO) -> None:
    digest.update(chunk)
    file.write(chunk)


async def _offload(num_bytes: int, work: Callable[..., None], *args: object) -> None:
    """Run expensive work in a thread, outside of the event loop."""
    if num_bytes < _OFFLOAD_BYTES:
        work(*args)
    else:
        await asyncio.to_thread(work, *args)


def measure(*, quick: bool) -> Iterator[Row]:
    """Measure only the lower bound."""
    for workload in WORKLOADS:
        rounds = (2 if quick else 4) if workload.megabytes >= 10 else (10 if quick else 40)
        result = run(workload, rounds, START_S)
        yield Row(workload=str(workload), metric="a round", unit="s", limit=median(result.round_s))


main = command(measure, __doc__)

if __name__ == "__main__":
    main()
