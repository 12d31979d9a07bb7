"""The agent's side of the trainer's connection: bytes between a socket on this machine and a stream to the cloud.

The agent has the device's key, and the trainer, which runs the user's code, does not. A connection of the trainer is a
gRPC stream of its own, to the server that the job's signed settings name, with mutual TLS; when the stream ends, the
trainer is told how, and may connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from grpc.aio import EOF  # type: ignore[attr-defined]  # it is public, and its stubs lack it

from edge_agent.link.channel import DEVICE_METADATA
from edge_agent.link.profile import Profile
from edge_agent.training.split.link import DATA, HEAD, MAX_RECORD_BYTES, end_record
from edge_agent.training.trainer_wire import FitRequest
from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.protocols import tls
from edgefl.protocols.ports.client_channel import open_channel
from edgefl.protocols.split.messages import METHOD, SERVICE

MAX_PATH_BYTES = 70  # of a home in which sockets are; the kernel's limit for their paths is 108
CHUNK_BYTES = 256 << 10

_log = logging.getLogger(__name__)


class SplitTunnel:
    """Makes sockets for trainings in parts. Used from the agent's event loop."""

    def __init__(self, profile: Profile, home: Path) -> None:
        self._profile, self._home = profile, home

    @contextlib.asynccontextmanager
    async def open(self, request: FitRequest) -> AsyncIterator[FitRequest]:
        """Yield the request with the way to the cloud's part, which is open within the block."""
        async with self.listening(request.train.split.server) as path:
            name = hashlib.sha256(f"{request.job}/{request.round}".encode()).hexdigest()[:32]
            yield dataclasses.replace(request, split_socket=str(path), split_kept=str(self._home / "split" / name))

    @contextlib.asynccontextmanager
    async def listening(self, server: str) -> AsyncIterator[Path]:
        """Listen within the block, and pass connections on to a server (HOST:PORT); return the socket's path."""
        near = self._home if len(os.fsencode(self._home)) < MAX_PATH_BYTES else None
        folder = Path(tempfile.mkdtemp(prefix="edgefl-split-", dir=near))
        running: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is not None:
                running.add(task)
                task.add_done_callback(running.discard)
            await self._pass_on(server, reader, writer)

        try:
            path = folder / "cloud"
            listener = await asyncio.start_unix_server(accept, path, limit=2 * MAX_RECORD_BYTES)
            async with listener:
                try:
                    yield path
                finally:
                    for task in running:
                        task.cancel()
                    await asyncio.gather(*running, return_exceptions=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _pass_on(self, server: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on one connection until one side ends it."""
        insecure = self._profile.insecure
        identity = None if insecure else tls.Identity.in_folder(self._home)
        metadata = ((DEVICE_METADATA, self._profile.device),) if insecure else ()
        channel = open_channel(server, identity)
        try:
            method: Any = channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None)
            call = method(metadata=metadata)
            up = asyncio.create_task(self._up(reader, call), name="split-up")
            try:
                await self._down(call, writer)
            finally:
                up.cancel()
                call.cancel()
                await asyncio.gather(up, return_exceptions=True)
        except (ConnectionError, asyncio.IncompleteReadError, ProtocolError) as error:  # the trainer is gone
            event(_log, logging.INFO, "split.left", server=server, reason=error)
        finally:
            writer.close()
            await channel.close(None)

    @staticmethod
    async def _up(reader: asyncio.StreamReader, call: Any) -> None:
        try:
            while True:
                kind, length = HEAD.unpack(await reader.readexactly(HEAD.size))
                if kind != DATA or length > MAX_RECORD_BYTES:
                    raise ProtocolError(f"a record of kind {kind} and {length} bytes from the trainer")
                data = memoryview(await reader.readexactly(length))
                for start in range(0, length, CHUNK_BYTES):
                    await call.write(bytes(data[start : start + CHUNK_BYTES]))
        except (asyncio.IncompleteReadError, ConnectionError):
            call.cancel()  # the trainer has ended
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            return  # the stream is over: `_down` says how

    @staticmethod
    async def _down(call: Any, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            while (data := await call.read()) is not EOF:
                writer.write(HEAD.pack(DATA, len(data)) + data)
                await writer.drain()
        if (task := asyncio.current_task()) is not None and task.cancelling():
            return
        code, details = await call.code(), await call.details()
        status = code.name if code is not grpc.StatusCode.OK else "UNAVAILABLE"
        with contextlib.suppress(ConnectionError):  # a trainer that is done has left
            writer.write(end_record(status, details or "the cloud ended the stream"))
            await writer.drain()
